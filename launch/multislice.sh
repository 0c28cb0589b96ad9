#!/usr/bin/env bash
# Trains on several TPU slices of a queued resource of gcloud, which are joined over the data center network. With --create
# it requests the slices first. Without CONFIG.yaml, --create only requests them.
#
#   launch/multislice.sh --name NAME --zone ZONE --slices N [options] -- CONFIG.yaml [key.sub=value ...]
#   launch/multislice.sh --name NAME --zone ZONE --slices N --create [options]
#
#   --name NAME              name of the queued resource; its slices are NAME-0, NAME-1, ...
#   --zone ZONE              zone of the slices
#   --slices N               number of slices, 2 or more
#   --project PROJECT        Google Cloud project (default: the one gcloud is configured with)
#   --create                 request the slices and wait until they are active; needs the next two options
#   --accelerator-type TYPE  type of a slice, for example v5litepod-16, v5p-32 or v6e-16
#   --version VERSION        version of the runtime, for example v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e
#   --spot                   with --create: request spot capacity, which is cheaper and can be preempted
#   --dry-run                print the commands and run nothing
#
# Copies this checkout to every worker, installs it there, and starts the train command on all workers. JAX learns the
# slices and their coordinator from the runtime (MEGASCALE_... variables). CONFIG.yaml is a path in the checkout. run.dir
# must be a folder that all workers share.

# shellcheck disable=SC2154 # parse_options sets the variables
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options 'name zone project slices accelerator_type version' 'create spot' "$@"
require_options --name --zone --slices
require_positive_integer --slices "$slices"
((slices > 1)) || fail "--slices: expected 2 or more (found $slices). Use launch/tpu_vm.sh for one slice"
[[ -n $create && ${#train_args[@]} == 0 ]] || require_config "the checkout is copied to the workers"
location=(--zone="$zone" ${project:+--project="$project"})

wait_until_active() { # fails if the request does
  local state
  while true; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${location[@]}" --format='value(state.state)')
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED) echo "error: $name is $state" >&2 && exit 1 ;;
    esac
    sleep 30
  done
}

if [[ -n $create ]]; then
  require_options --accelerator-type --version
  run gcloud compute tpus queued-resources create "$name" "${location[@]}" --node-count="$slices" --node-prefix="$name" \
    --accelerator-type="$accelerator_type" --runtime-version="$version" ${spot:+--spot}
  [[ -n $dry_run ]] || wait_until_active
elif [[ -n $accelerator_type$version$spot ]]; then
  fail "--accelerator-type, --version and --spot are only used with --create"
fi
((${#train_args[@]})) || exit 0
install_on_all_workers queued-resources "$name" "${location[@]}" --node=all --batch-size=all
# Start slice by slice. Given the queued resource, gcloud would start at most 64 workers and wait for them to end.
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((slice = 0; slice < slices; slice++)); do
  if [[ -n $dry_run ]]; then
    train_on_all_workers "$name-$slice" "${location[@]}"
  else
    train_on_all_workers "$name-$slice" "${location[@]}" &
    pids+=($!)
  fi
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
