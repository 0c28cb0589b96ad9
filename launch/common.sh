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

needs() { # OPTION...: that they were given
  local option variable
  for option; do
    variable=${option#--} && variable=${variable//-/_}
    [[ -n ${!variable} ]] || fail "$option is missing"
  done
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

# Sets a variable for each option of a script, and `train` to what is after --.
options() { # "options with a value" "options without" THE SCRIPT'S ARGUMENTS...
  local valued=" $1 " flags=" $2 dry_run " option value
  for option in $1 $2; do printf -v "$option" ''; done
  shift 2
  while (($#)) && [[ $1 != -- ]]; do
    [[ $1 != --help && $1 != -h ]] || { usage && exit; }
    option=${1%%=*} && option=${option#--} && option=${option//-/_}
    if [[ $1 == --* && $1 != *=* && $flags == *" $option "* ]]; then
      printf -v "$option" yes
    elif [[ $1 == --* && $valued == *" $option "* ]]; then
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
  train=("$@")
  no_late_dry_run "$@"
}

no_late_dry_run() { # the train command's arguments
  [[ " $* " != *" --dry-run "* ]] || fail "--dry-run is among the train command's arguments; put it before --"
}

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# For `train` of the workers, which get this checkout.
needs_config() {
  ((${#train[@]})) || fail "-- CONFIG.yaml is missing"
  train[0]=${train[0]#"$checkout"/}
  [[ ${train[0]} != /* && -f $checkout/${train[0]} ]] || fail "${train[0]}: no such file in $checkout, which is what the workers get"
}

install_on_all_workers() { # KIND (tpu-vm or queued-resources) NAME FLAGS...
  local kind=$1 name=$2 archive=${TMPDIR:-/tmp}/jaxembed-$2.tar.gz
  shift 2
  run tar -czf "$archive" -C "$checkout" -X "$checkout/.dockerignore" .
  run gcloud compute tpus "$kind" scp "$archive" "$name:jaxembed.tar.gz" "$@" --worker=all
  # The runtimes' own Python may be older than 3.11: uv brings one.
  run gcloud compute tpus "$kind" ssh "$name" "$@" --worker=all --command="mkdir -p jaxembed && \
tar -xzf jaxembed.tar.gz -C jaxembed && cd jaxembed && \
python3 -m pip install --user --quiet uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv && \
~/.local/bin/uv pip install --quiet --python .venv -c constraints.txt '.[tpu]'"
}

train_on_all_workers() { # TPU_VM FLAGS...
  local name=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$name" "$@" --worker=all \
    --command="cd jaxembed && .venv/bin/python -m jaxembed.train $(quoted "${train[@]}")"
}
