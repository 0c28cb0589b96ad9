#!/usr/bin/env bash
# Trains in several processes on this machine, each with simulated CPU devices: a pod to try things on.
#
#   launch/local_pod.sh [options] PROCESSES DEVICES_EACH -- CONFIG.yaml [key.sub=value ...]
#
#   --module NAME  what each process runs as python -m NAME (default: jaxembed.train)
#   --dry-run      prints the commands and runs none
#
# Shows what process 0 prints, and what the others write to standard error with their number before it. SIGTERM and
# Ctrl-C go to all processes. Waits for all of them and exits as the first one that failed. PYTHON names another
# interpreter than python.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

module=jaxembed.train
while [[ ${1-} == -* && $1 != -- ]]; do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run) dry_run=yes ;;
    --module)
      [[ ${2-} != -* ]] || fail "--module needs a value"
      module=${2-} && needs --module && shift
      ;;
    *) fail "unknown argument $1" ;;
  esac
  shift
done
whole PROCESSES "${1-}"
whole DEVICES_EACH "${2-}"
[[ ${3-} == -- && -n ${4-} ]] || fail "-- CONFIG.yaml is missing"
count=$1 devices=$2 python=${PYTHON:-python}
shift 3
no_late_dry_run "$@"
[[ $module != jaxembed.train || -f $1 ]] || fail "$1: no such config file"
type -P "$python" >/dev/null || fail "$python: no such command; activate the environment, or let PYTHON name its interpreter"

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
pids=()
tagged() { # lines with a number before them; the signals are for the processes
  trap '' INT TERM
  exec sed -u "s/^/[$1] /" >&2
}

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM HUP
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT
set -m # each process in a group of its own: Ctrl-C comes once, from here
for ((id = 0; id < count; id++)); do
  command=(env JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$id"
    XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices" "$python" -m "$module" "$@")
  if [[ -n $dry_run ]]; then
    run "${command[@]}"
  elif ((id == 0)); then
    "${command[@]}" </dev/null &
    pids+=($!)
  else
    "${command[@]}" </dev/null >/dev/null 2> >(tagged "$id") &
    pids+=($!)
  fi
done

status=0
while ((${#pids[@]})); do
  wait -n -p ended "${pids[@]}" && code=0 || code=$?
  [[ -n ${ended-} ]] || continue # a signal came
  ((status)) || status=$code
  for i in "${!pids[@]}"; do
    [[ ${pids[i]} != "$ended" ]] || unset "pids[$i]"
  done
done
exit "$status"
