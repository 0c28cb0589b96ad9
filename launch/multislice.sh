#!/usr/bin/env bash
# Trains on several TPU slices, joined over the data centre's network, by a queued resource of gcloud; with --create it asks
# for the slices first, or alone:
#
#   launch/multislice.sh --name NAME --zone ZONE --slices N [options] -- CONFIG.yaml [key.sub=value ...]
#   launch/multislice.sh --name NAME --zone ZONE --slices N --create [options]
#
#   --name NAME              of the queued resource; its slices are NAME-0, NAME-1, ...
#   --zone ZONE              where it is
#   --slices N               how many, 2 or more
#   --project PROJECT        as gcloud is configured if left out
#   --create                 asks for it and waits until it is there, which needs the next two
#   --accelerator-type TYPE  of a slice, such as v5litepod-16, v5p-32 or v6e-16
#   --version VERSION        of the runtime, such as v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e
#   --spot                   of --create: cheaper, and may be taken away
#   --dry-run                prints the commands and runs none
#
# Copies this checkout to every worker, installs it there and starts the train command on all of them. The runtime tells
# JAX the slices and their coordinator (MEGASCALE_...): nothing is set here. CONFIG.yaml is a path in the checkout.
# run.dir must be a folder that all workers share.

# shellcheck disable=SC2154 # `options` sets them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options 'name zone project slices accelerator_type version' 'create spot' "$@"
needs --name --zone --slices
whole --slices "$slices"
((slices > 1)) || fail "--slices is $slices; one slice is for launch/tpu_vm.sh"
[[ -n $create && ${#train[@]} == 0 ]] || needs_config
place=(--zone="$zone" ${project:+--project="$project"})

wait_until_active() {
  local state
  while true; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED) echo "error: $name is $state" >&2 && exit 1 ;;
    esac
    sleep 30
  done
}

if [[ -n $create ]]; then
  needs --accelerator-type --version
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-count="$slices" --node-prefix="$name" \
    --accelerator-type="$accelerator_type" --runtime-version="$version" ${spot:+--spot}
  [[ -n $dry_run ]] || wait_until_active
elif [[ -n $accelerator_type$version$spot ]]; then
  fail "--accelerator-type, --version and --spot are of a resource that --create asks for"
fi
((${#train[@]})) || exit 0
install_on_all_workers queued-resources "$name" "${place[@]}" --node=all --batch-size=all
# Not by the queued resource: gcloud would start no more than 64 of its workers, and wait for these to end.
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((slice = 0; slice < slices; slice++)); do
  if [[ -n $dry_run ]]; then
    train_on_all_workers "$name-$slice" "${place[@]}"
  else
    train_on_all_workers "$name-$slice" "${place[@]}" &
    pids+=($!)
  fi
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
