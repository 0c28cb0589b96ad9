#!/usr/bin/env bash
# Trains on one TPU slice with one or more workers, through gcloud. With --create it creates the slice first. Without
# CONFIG.yaml, --create only creates it.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE [options] -- CONFIG.yaml [key.sub=value ...]
#   launch/tpu_vm.sh --name NAME --zone ZONE --create [options]
#
#   --name NAME              name of the TPU VM
#   --zone ZONE              zone of the TPU VM
#   --project PROJECT        Google Cloud project (default: the one gcloud is configured with)
#   --create                 create the TPU VM; needs the next two options
#   --accelerator-type TYPE  type of the slice, for example v5litepod-16, v5p-32 or v6e-16
#   --version VERSION        version of the runtime, for example v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e
#   --spot                   with --create: request spot capacity, which is cheaper and can be preempted
#   --dry-run                print the commands and run nothing
#
# Copies this checkout to every worker, installs it there, and starts the train command on all workers. The workers find
# each other through JAX. CONFIG.yaml is a path in the checkout. run.dir must be a folder that all workers share.

# shellcheck disable=SC2154 # parse_options sets the variables
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options 'name zone project accelerator_type version' 'create spot' "$@"
require_options --name --zone
[[ -n $create && ${#train_args[@]} == 0 ]] || require_config "the checkout is copied to the workers"
location=(--zone="$zone" ${project:+--project="$project"})

if [[ -n $create ]]; then
  require_options --accelerator-type --version
  run gcloud compute tpus tpu-vm create "$name" "${location[@]}" \
    --accelerator-type="$accelerator_type" --version="$version" ${spot:+--spot}
elif [[ -n $accelerator_type$version$spot ]]; then
  fail "--accelerator-type, --version and --spot are only used with --create"
fi
((${#train_args[@]})) || exit 0
install_on_all_workers tpu-vm "$name" "${location[@]}"
train_on_all_workers "$name" "${location[@]}"
