#!/usr/bin/env bash
# Trains on one TPU slice, of one worker or many, by gcloud; with --create it makes the slice first, or alone:
#
#   launch/tpu_vm.sh --name NAME --zone ZONE [options] -- CONFIG.yaml [key.sub=value ...]
#   launch/tpu_vm.sh --name NAME --zone ZONE --create [options]
#
#   --name NAME              of the TPU VM
#   --zone ZONE              where it is
#   --project PROJECT        as gcloud is configured if left out
#   --create                 makes it, which needs the next two
#   --accelerator-type TYPE  such as v5litepod-16, v5p-32 or v6e-16
#   --version VERSION        of the runtime, such as v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e
#   --spot                   of --create: cheaper, and may be taken away
#   --dry-run                prints the commands and runs none
#
# Copies this checkout to every worker, installs it there and starts the train command on all of them; JAX finds the
# others by itself. CONFIG.yaml is a path in the checkout. run.dir must be a folder that all workers share.

# shellcheck disable=SC2154 # `options` sets them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options 'name zone project accelerator_type version' 'create spot' "$@"
needs --name --zone
[[ -n $create && ${#train[@]} == 0 ]] || needs_config
place=(--zone="$zone" ${project:+--project="$project"})

if [[ -n $create ]]; then
  needs --accelerator-type --version
  run gcloud compute tpus tpu-vm create "$name" "${place[@]}" \
    --accelerator-type="$accelerator_type" --version="$version" ${spot:+--spot}
elif [[ -n $accelerator_type$version$spot ]]; then
  fail "--accelerator-type, --version and --spot are of a TPU that --create makes"
fi
((${#train[@]})) || exit 0
install_on_all_workers tpu-vm "$name" "${place[@]}"
train_on_all_workers "$name" "${place[@]}"
