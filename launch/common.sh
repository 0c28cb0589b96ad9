# shellcheck shell=bash
# Shared functions of the launch scripts: help, errors, dry runs, quoting, option parsing, and setup of TPU workers.

dry_run=

print_usage() { # prints the comment at the top of the script
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

fail() { # MESSAGE...: prints an error on one line, and exits with code 2
  echo "error: $*; see $0 --help" >&2
  exit 2
}

require_options() { # OPTION...: fails unless each has a value
  local option variable
  for option; do
    variable=${option#--} && variable=${variable//-/_}
    [[ -n ${!variable} ]] || fail "$option is missing"
  done
}

require_positive_integer() { # NAME VALUE: fails unless the value is one
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1: '$2' is not a positive integer"
}

quote() { # prints its arguments so that a shell reads them back unchanged
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] && words+=("$word") || words+=("${word@Q}")
  done
  echo "${words[*]}"
}

run() { # runs a command, or only prints it in a dry run
  if [[ -n $dry_run ]]; then quote "$@"; else "$@"; fi
}

# Sets one variable for each option of a script, and `train_args` to the arguments after --.
parse_options() { # "OPTIONS WITH A VALUE" "FLAGS" ARGUMENTS OF THE SCRIPT...
  local with_value=" $1 " flags=" $2 dry_run " option value
  for option in $1 $2; do printf -v "$option" ''; done
  shift 2
  while (($#)) && [[ $1 != -- ]]; do
    [[ $1 != --help && $1 != -h ]] || { print_usage && exit; }
    option=${1%%=*} && option=${option#--} && option=${option//-/_}
    if [[ $1 == --* && $1 != *=* && $flags == *" $option "* ]]; then
      printf -v "$option" yes
    elif [[ $1 == --* && $with_value == *" $option "* ]]; then
      if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2-} && shift; fi
      [[ -n $value && $value != -* ]] || fail "--${option//_/-} needs a value"
      printf -v "$option" %s "$value"
    else
      fail "unknown argument $1"
    fi
    shift
  done
  shift || true # the --
  # shellcheck disable=SC2034 # the scripts read it
  train_args=("$@")
  reject_late_dry_run "$@"
}

reject_late_dry_run() { # ARGUMENTS OF THE TRAIN COMMAND...: fails if --dry-run is among them
  [[ " $* " != *" --dry-run "* ]] || fail "--dry-run is among the arguments of the train command; put it before --"
}

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

require_config() { # REASON: checks that CONFIG.yaml is in this checkout, and makes its path relative to it
  ((${#train_args[@]})) || fail "-- CONFIG.yaml is missing"
  train_args[0]=${train_args[0]#"$checkout"/}
  [[ ${train_args[0]} != /* && -f $checkout/${train_args[0]} ]] ||
    fail "${train_args[0]}: no such file in $checkout ($1)"
}

install_on_all_workers() { # KIND (tpu-vm or queued-resources) NAME FLAGS...: copies this checkout, and installs it
  local kind=$1 name=$2 archive
  shift 2
  # A private folder with a random name: nobody else can read the archive, or put a link in its place.
  archive_folder=${TMPDIR:-/tmp}/jaxembed.XXXXXXXX
  [[ -n $dry_run ]] || archive_folder=$(mktemp -d "$archive_folder")
  archive=$archive_folder/jaxembed.tar.gz
  trap '[[ -n $dry_run ]] || rm -rf "$archive_folder"' EXIT
  # With ./ an exclusion matches only at the top: jaxembed/runs is a package.
  run tar -czf "$archive" -C "$checkout" --exclude=./.git --exclude=./.venv --exclude=./runs \
    --exclude=__pycache__ --exclude='.*_cache' .
  run gcloud compute tpus "$kind" scp "$archive" "$name:jaxembed.tar.gz" "$@" --worker=all
  [[ -n $dry_run ]] || rm -rf "$archive_folder"
  # The Python of the TPU runtime may be older than 3.11, so uv installs one.
  run gcloud compute tpus "$kind" ssh "$name" "$@" --worker=all --command="mkdir -p jaxembed && \
tar -xzf jaxembed.tar.gz -C jaxembed && cd jaxembed && \
python3 -m pip install --user --quiet uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv && \
~/.local/bin/uv pip install --quiet --python .venv -c constraints.txt '.[tpu]'"
}

train_on_all_workers() { # TPU_VM_NAME FLAGS...: starts the train command, and waits for it
  local name=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$name" "$@" --worker=all \
    --command="cd jaxembed && .venv/bin/python -m jaxembed.train $(quote "${train_args[@]}")"
}
