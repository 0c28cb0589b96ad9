#!/usr/bin/env bash
# Simulates a pod on this machine: trains in several processes, each with simulated CPU devices.
#
#   launch/local_pod.sh [options] PROCESSES DEVICES_EACH -- CONFIG.yaml [key.sub=value ...]
#
#   --module NAME  Python module that each process runs (default: jaxembed.train)
#   --dry-run      print the commands and run nothing
#
# Prints the output of process 0, and the standard error of the other processes with their number in front. Ctrl-C,
# SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop all processes. The script waits for all of them, and exits with the code of the
# first that failed. Set PYTHON to use another interpreter than python.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

module=jaxembed.train
while [[ ${1-} == -* && $1 != -- ]]; do
  case $1 in
    --help | -h) print_usage && exit ;;
    --dry-run) dry_run=yes ;;
    --module)
      [[ ${2-} != -* ]] || fail "--module needs a value"
      module=${2-} && require_options --module && shift
      ;;
    *) fail "unknown argument $1" ;;
  esac
  shift
done
require_positive_integer PROCESSES "${1-}"
require_positive_integer DEVICES_EACH "${2-}"
[[ ${3-} == -- && -n ${4-} ]] || fail "-- CONFIG.yaml is missing"
count=$1 devices=$2 python=${PYTHON:-python}
shift 3
reject_late_dry_run "$@"
[[ $module != jaxembed.train || -f $1 ]] || fail "$1: no such config file"
type -P "$python" >/dev/null || fail "$python: no such command. Activate the environment, or set PYTHON to its interpreter"

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
pids=()
add_prefix() { # NUMBER: copies lines to standard error with [NUMBER] in front, and ignores the signals that stop processes
  trap '' INT TERM
  exec sed -u "s/^/[$1] /" >&2
}

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM HUP USR1 USR2
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT
set -m # each process gets its own group, so that Ctrl-C reaches it only once, from this script
for ((id = 0; id < count; id++)); do
  command=(env JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$id"
    XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices" "$python" -m "$module" "$@")
  if [[ -n $dry_run ]]; then
    run "${command[@]}"
  elif ((id == 0)); then
    "${command[@]}" </dev/null &
    pids+=($!)
  else
    "${command[@]}" </dev/null >/dev/null 2> >(add_prefix "$id") &
    pids+=($!)
  fi
done

status=0
while ((${#pids[@]})); do
  wait -n -p ended "${pids[@]}" && code=0 || code=$?
  [[ -n ${ended-} ]] || continue # a signal interrupted the wait
  ((status)) || status=$code
  for i in "${!pids[@]}"; do
    [[ ${pids[i]} != "$ended" ]] || unset "pids[$i]"
  done
done
exit "$status"
