#!/usr/bin/env bash
# Trains on the GPUs of a Slurm job, a process for each; JAX finds the others by Slurm's own variables:
#
#   sbatch [sbatch's options] launch/slurm.sh CONFIG.yaml [key.sub=value ...]
#   bash launch/slurm.sh --dry-run CONFIG.yaml [key.sub=value ...]
#
#   --dry-run  prints the command that the job would run, and runs none
#
# Ask for as many tasks as GPUs of a node: sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 ...
# Activate the environment first; PYTHON names another interpreter. The folder that sbatch is called in, and run.dir, must be
# shared by the nodes. Two minutes before its time is over, and where Slurm takes its nodes away with as much grace, the job
# saves its step and stops; the same command goes on.

#SBATCH --job-name=jaxembed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# sbatch runs a copy of this file, so it stands alone.
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
[[ " $* " != *" --dry-run "* ]] || fail "--dry-run is among the train command's arguments; put it before CONFIG.yaml"
# Each task sees all GPUs of its node and takes the one of its own number, as JAX expects.
python=${PYTHON:-python}
command=(srun --gpu-bind=none "$python" -m jaxembed.train "$@")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}" && echo && exit
fi
[[ -n ${SLURM_JOB_ID-} ]] || fail "this is no Slurm job; submit it with sbatch"
tasks=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-$tasks}
((tasks == gpus)) || fail "$tasks tasks for $gpus GPUs of a node; set --ntasks-per-node and --gpus-per-node to one number"
[[ -n ${JAX_PLATFORMS-} ]] || "$python" -c 'import jax_plugins' 2>/dev/null ||
  fail "$python has no JAX for GPUs and would train on CPUs; pip install -c constraints.txt '.[cuda]'"
[[ -z ${SLURM_CPUS_PER_TASK-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take sbatch's
exec "${command[@]}"
