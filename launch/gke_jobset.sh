#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet that kubectl applies:
#
#   launch/gke_jobset.sh --name NAME --image IMAGE --accelerator TYPE --topology AxB [options] -- CONFIG.yaml [key.sub=value ...]
#
#   --name NAME         of the JobSet: lower-case letters, digits and -
#   --image IMAGE       a container image in which `python -m jaxembed.train` runs (docs/pods.md)
#   --accelerator TYPE  GKE's name, such as tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology AxB      of a slice, such as 4x4 or 2x2x4
#   --chips N           of a host (default: 4)
#   --slices N          node pools to train on (default: 1)
#   --claim NAME        a PersistentVolumeClaim that all pods mount as /runs, for run.dir=/runs/...
#   --restarts N        of the whole, after a failure or where nodes are taken away (default: 10)
#   --spot              on spot nodes
#   --namespace NAME    as kubectl is configured if left out
#   --dry-run           prints the manifest and applies nothing
#
# A job for each slice, a pod for each of its hosts, all in one node pool. GKE tells JAX the hosts, the JobSet controller the
# slices. The cluster needs the JobSet controller and node pools of that accelerator and topology.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' image='' accelerator='' topology='' chips=4 slices=1 claim='' restarts=10 spot='' namespace=''
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run) dry_run=yes ;;
    --spot) spot=yes ;;
    --name) name=${2-} && shift ;;
    --image) image=${2-} && shift ;;
    --accelerator) accelerator=${2-} && shift ;;
    --topology) topology=${2-} && shift ;;
    --chips) chips=${2-} && shift ;;
    --slices) slices=${2-} && shift ;;
    --claim) claim=${2-} && shift ;;
    --restarts) restarts=${2-} && shift ;;
    --namespace) namespace=${2-} && shift ;;
    --) break ;;
    *) fail "unknown argument $1" ;;
  esac
  (($#)) && shift
done
needs --image "$image"
needs --accelerator "$accelerator"
for what in name claim namespace; do
  [[ ${!what} =~ ^([a-z0-9]([a-z0-9-]*[a-z0-9])?)?$ ]] || fail "--$what is '${!what}'; expected lower-case letters, digits and -"
done
needs --name "$name"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology is '$topology'; expected numbers of chips such as 4x4"
whole --chips "$chips"
whole --slices "$slices"
whole --restarts "$restarts"
((${topology//x/*} % chips == 0)) || fail "--topology $topology is not divisible by --chips $chips of a host"
hosts=$((${topology//x/*} / chips))
[[ ${1-} == -- && -n ${2-} ]] || fail "-- CONFIG.yaml is missing"
shift

yaml() { # a text as a YAML string
  echo "'${1//\'/\'\'}'"
}

manifest() {
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
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300  # time to save the step
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(yaml "$accelerator")
              cloud.google.com/gke-tpu-topology: $(yaml "$topology")
${spot:+              cloud.google.com/gke-spot: 'true'
}            containers:
            - name: train
              image: $(yaml "$image")
              command: [python, -m, jaxembed.train]
              args:
$(for argument; do echo "              - $(yaml "$argument")"; done)
              ports:
              - containerPort: 8471  # between the hosts of a slice
              - containerPort: 8080  # between slices
              - containerPort: 8482  # JAX's coordinator
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
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
fi
