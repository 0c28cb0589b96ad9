#!/usr/bin/env bash
# Trains on the GPUs of a Slurm job, with one process per GPU.
#
#   sbatch [sbatch's options] launch/slurm.sh CONFIG.yaml [key.sub=value ...]
#   bash launch/slurm.sh --dry-run CONFIG.yaml [key.sub=value ...]
#
#   --dry-run  print the command of the job and run nothing
#
# Request as many tasks per node as GPUs: sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 ...
# Activate the environment first, or set PYTHON to its interpreter. The nodes must share the folder in which sbatch is
# called, and run.dir. The processes find each other through Slurm's variables. Two minutes before its time limit, and when
# Slurm preempts its nodes with as much notice, the job saves its step and stops. The same command resumes it.

#SBATCH --job-name=jaxembed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# sbatch runs a copy of this file, so it cannot source common.sh.
set -euo pipefail

fail() {
  echo "error: $*; see launch/slurm.sh --help" >&2
  exit 2
}

dry_run=
case ${1-} in
  --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
  --dry-run) dry_run=yes && shift ;;
  -*) fail "unknown argument $1" ;;
esac
[[ -n ${1-} ]] || fail "CONFIG.yaml is missing"
[[ -f $1 ]] || fail "$1: no such config file"
[[ " $* " != *" --dry-run "* ]] || fail "--dry-run is among the arguments of the train command; put it before CONFIG.yaml"
# JAX expects each task to see all GPUs of its node, and uses the one with the task's local number.
python=${PYTHON:-python}
command=(srun --gpu-bind=none "$python" -m jaxembed.train "$@")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}" && echo && exit
fi
[[ -n ${SLURM_JOB_ID-} ]] || fail "not in a Slurm job. Submit this script with sbatch"
tasks=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-$tasks}
((tasks == gpus)) || fail "$tasks tasks per node, but $gpus GPUs. Set --ntasks-per-node and --gpus-per-node to the same number"
[[ -n ${JAX_PLATFORMS-} ]] || "$python" -c 'import jax_plugins' 2>/dev/null ||
  fail "$python has no JAX for GPUs and would train on CPUs. Run: pip install -c constraints.txt '.[cuda]'"
[[ -z ${SLURM_CPUS_PER_TASK-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun ignores sbatch's --cpus-per-task
exec "${command[@]}"
