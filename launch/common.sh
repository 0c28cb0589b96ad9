# shellcheck shell=bash
# Sourced by the scripts beside it: their help, errors, dry runs and quoting, and what is done on every worker of a TPU.

dry_run=

usage() { # the comment that a script opens with
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

fail() {
  echo "error: $*; see $0 --help" >&2
  exit 2
}

needs() { # OPTION VALUE
  [[ -n $2 ]] || fail "$1 is missing"
}

whole() { # NAME VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2'; expected a whole number above 0"
}

quoted() { # its arguments as a shell reads them back
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] && words+=("$word") || words+=("${word@Q}")
  done
  echo "${words[*]}"
}

run() { # a command, or what it would be
  if [[ -n $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# What the two scripts for gcloud take; sets a variable for each option, `place` for gcloud, and `train` for what is after --.
# shellcheck disable=SC2034 # the scripts read them
gcloud_options() {
  name='' zone='' project='' slices='' accelerator='' version='' create='' spot=''
  while (($#)); do
    case $1 in
      --help | -h) usage && exit ;;
      --dry-run) dry_run=yes ;;
      --create) create=yes ;;
      --spot) spot=yes ;;
      --name) name=${2-} && shift ;;
      --zone) zone=${2-} && shift ;;
      --project) project=${2-} && shift ;;
      --slices) slices=${2-} && shift ;;
      --accelerator-type) accelerator=${2-} && shift ;;
      --version) version=${2-} && shift ;;
      --) break ;;
      *) fail "unknown argument $1" ;;
    esac
    (($#)) && shift
  done
  needs --name "$name"
  needs --zone "$zone"
  [[ ${1-} == -- && -n ${2-} ]] || fail "-- CONFIG.yaml is missing"
  place=(--zone="$zone" ${project:+--project="$project"}) train=("$@")
}

train_on_all_workers() { # KIND (tpu-vm or queued-resources) NAME FLAGS... -- CONFIG.yaml [key.sub=value ...]
  local kind=$1 name=$2 flags=() checkout archive
  shift 2
  while [[ $1 != -- ]]; do
    flags+=("$1")
    shift
  done
  shift
  checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ -f $checkout/$1 ]] || fail "$1: no such file in $checkout, which is what the workers get"
  archive=${TMPDIR:-/tmp}/jaxembed-$name.tar.gz
  on_all() { run gcloud compute tpus "$kind" ssh "$name" "${flags[@]}" --worker=all --command="$1"; }

  run tar -czf "$archive" -C "$checkout" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ .
  run gcloud compute tpus "$kind" scp "$archive" "$name:jaxembed.tar.gz" "${flags[@]}" --worker=all
  # The runtimes' own Python may be older than 3.11: uv brings one.
  on_all "mkdir -p jaxembed && tar -xzf jaxembed.tar.gz -C jaxembed && cd jaxembed && \
python3 -m pip install --user --quiet uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv && \
~/.local/bin/uv pip install --quiet --python .venv -c constraints.txt '.[tpu]'"
  on_all "cd jaxembed && .venv/bin/python -m jaxembed.train $(quoted "$@")"
}
