#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster. Applies a JobSet with kubectl.
#
#   launch/gke_jobset.sh --name NAME --image IMAGE --accelerator TYPE --topology AxB [options] -- CONFIG.yaml [key.sub=value ...]
#
#   --name NAME         name of the JobSet: up to 45 lowercase letters, digits and hyphens
#   --image IMAGE       container image that runs `python -m jaxembed.train` (docs/guides/pods.md)
#   --accelerator TYPE  GKE's accelerator type, for example tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology AxB      topology of a slice, for example 4x4 or 2x2x4
#   --chips N           chips per host (default: 4)
#   --slices N          number of slices, each in its own node pool (default: 1)
#   --claim NAME        PersistentVolumeClaim that all pods mount as /runs, for run.dir=/runs/...; required for several hosts
#   --restarts N        how often the JobSet restarts after a failure (default: 10, 0: never); preempted nodes do not count
#   --spot              use spot nodes
#   --namespace NAME    Kubernetes namespace (default: the one kubectl is configured with)
#   --dry-run           print the manifest and apply nothing
#
# Creates one job per slice, and one pod per host. The pods of a slice share one node pool. JAX learns the hosts from GKE and the
# slices from the JobSet controller. The cluster needs the JobSet controller 0.6 or newer, and node pools with this
# accelerator and topology. CONFIG.yaml is a path in this checkout, which the image contains, or an absolute path in the pods.

# shellcheck disable=SC2154 # parse_options sets the variables
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options 'name image accelerator topology chips slices claim restarts namespace' 'spot' "$@"
: "${chips:=4}" "${slices:=1}" "${restarts:=10}"
require_options --name --image --accelerator --topology
[[ ${train_args[0]-} == /* && ${train_args[0]} != "$checkout"/* ]] || require_config "the image contains this checkout"

label='[a-z0-9]([a-z0-9-]*[a-z0-9])?'
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#name} -le 45 ]] || # names of pods, limited to 63 characters, extend it
  fail "--name: '$name' is not a valid name (expected a letter, then up to 44 lowercase letters, digits and hyphens)"
[[ $namespace =~ ^($label)?$ ]] || fail "--namespace: '$namespace' is not a valid name (expected lowercase letters, digits and hyphens)"
[[ $claim =~ ^($label(\.$label)*)?$ ]] || fail "--claim: '$claim' is not a valid name (expected lowercase letters, digits, hyphens and dots)"
case $accelerator in
  tpu-v4-* | tpu-v5p-* | tpu7x*) axes=3 ;;
  tpu-v5-lite-* | tpu-v6e-*) axes=2 ;;
  *) fail "--accelerator: '$accelerator' is not a GKE TPU type (expected tpu-v5-lite-podslice, tpu-v5p-slice or similar)" ;;
esac
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((axes - 1))}$ ]] ||
  fail "--topology: '$topology' does not fit $accelerator (expected $axes axes, such as $( ((axes == 2)) && echo 4x4 || echo 2x2x4))"
require_positive_integer --chips "$chips"
require_positive_integer --slices "$slices"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts: '$restarts' is not a non-negative integer"
((${topology//x/*} % chips == 0)) || fail "--topology: the chips of $topology are not divisible by --chips $chips per host"
hosts=$((${topology//x/*} / chips))
((hosts > 1 || slices == 1)) || fail "--slices: GKE joins only slices of several hosts ($slices slices, but --topology $topology has one host)"
((hosts == 1)) || [[ -n $claim ]] || fail "--claim is missing: the $((hosts * slices)) hosts need a shared folder for run.dir"

quote_yaml() { # prints a text as a YAML string on one line: a line such as --- in it would end the document
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\r'/\\r} text=${text//$'\t'/\\t}
  if [[ $text == "$1" ]]; then echo "'${1//\'/\'\'}'"; else echo "\"$text\""; fi
}

quote_argument() { # prints an argument of a container as a YAML string; in it, Kubernetes expands $(NAME), and reads $$ as $
  # shellcheck disable=SC2016 # these are literal
  quote_yaml "${1//'$'/'$$'}"
}

print_manifest() { # ARGUMENTS OF THE TRAIN COMMAND...
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
${namespace:+  namespace: $namespace
}  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:  # preempted: at once, or after saving the step (exit code 143)
          rules:
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
              status: 'True'
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [143]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300  # time to save the step
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(quote_yaml "$accelerator")
              cloud.google.com/gke-tpu-topology: $(quote_yaml "$topology")
${spot:+              cloud.google.com/gke-spot: 'true'
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: 'true'
              effect: NoSchedule
}            containers:
            - name: train
              image: $(quote_yaml "$image")
              command: [python, -m, jaxembed.train]
              args:
$(for argument; do echo "              - $(quote_argument "$argument")"; done)
              ports:
              - containerPort: 8471  # hosts of a slice
              - containerPort: 8080  # slices
              - containerPort: 8482  # JAX coordinator
              resources:
                requests:
                  google.com/tpu: $chips
                limits:
                  google.com/tpu: $chips
EOF
  [[ -z $claim ]] || cat <<EOF
              env:
              - name: JAX_COMPILATION_CACHE_DIR
                value: /runs/.compiled
              volumeMounts:
              - name: runs
                mountPath: /runs
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $claim
EOF
}

if [[ -n $dry_run ]]; then
  print_manifest "${train_args[@]}"
else
  print_manifest "${train_args[@]}" | kubectl apply -f -
fi
