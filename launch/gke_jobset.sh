#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet that kubectl applies:
#
#   launch/gke_jobset.sh --name NAME --image IMAGE --accelerator TYPE --topology AxB [options] -- CONFIG.yaml [key.sub=value ...]
#
#   --name NAME         of the JobSet: up to 45 lower-case letters, digits and -
#   --image IMAGE       a container image in which `python -m jaxembed.train` runs (docs/pods.md)
#   --accelerator TYPE  GKE's name, such as tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology AxB      of a slice, such as 4x4 or 2x2x4
#   --chips N           of a host (default: 4)
#   --slices N          node pools to train on (default: 1)
#   --claim NAME        a PersistentVolumeClaim that all pods mount as /runs, for run.dir=/runs/...; several hosts need one
#   --restarts N        of the whole after a failure, 0 for none (default: 10); where nodes are taken away it starts again
#                       uncounted
#   --spot              on spot nodes
#   --namespace NAME    as kubectl is configured if left out
#   --dry-run           prints the manifest and applies nothing
#
# A job for each slice, a pod for each of its hosts, all in one node pool. GKE tells JAX the hosts, the JobSet controller the
# slices. The cluster needs the JobSet controller (0.6 or newer) and node pools of that accelerator and topology. CONFIG.yaml
# is a path in this checkout, which the image holds, or one that begins with / in the pods.

# shellcheck disable=SC2154 # `options` sets them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options 'name image accelerator topology chips slices claim restarts namespace' 'spot' "$@"
: "${chips:=4}" "${slices:=1}" "${restarts:=10}"
needs --name --image --accelerator --topology
[[ ${train[0]-} == /* && ${train[0]} != "$checkout"/* ]] || needs_config

label='[a-z0-9]([a-z0-9-]*[a-z0-9])?'
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#name} -le 45 ]] || # the pods' names, which add to it, may have 63 characters
  fail "--name is '$name'; expected up to 45 lower-case letters, digits and -, a letter first"
[[ $namespace =~ ^($label)?$ ]] || fail "--namespace is '$namespace'; expected lower-case letters, digits and -"
[[ $claim =~ ^($label(\.$label)*)?$ ]] || fail "--claim is '$claim'; expected lower-case letters, digits, - and ."
case $accelerator in
  tpu-v4-* | tpu-v5p-* | tpu7x*) axes=3 ;;
  tpu-v5-lite-* | tpu-v6e-*) axes=2 ;;
  *) fail "--accelerator is '$accelerator'; expected GKE's name, such as tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice" ;;
esac
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((axes - 1))}$ ]] ||
  fail "--topology is '$topology'; expected $axes numbers of chips for $accelerator, such as $( ((axes == 2)) && echo 4x4 || echo 2x2x4)"
whole --chips "$chips"
whole --slices "$slices"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is '$restarts'; expected a whole number"
((${topology//x/*} % chips == 0)) || fail "--topology $topology is not divisible by --chips $chips of a host"
hosts=$((${topology//x/*} / chips))
((hosts > 1 || slices == 1)) || fail "--slices is $slices, but --topology $topology has one host; GKE joins slices of several hosts alone"
((hosts == 1)) || [[ -n $claim ]] || fail "--claim is missing; the $((hosts * slices)) hosts need one folder for run.dir"

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
        podFailurePolicy:  # taken away, at once or in time to save the step
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
              cloud.google.com/gke-tpu-accelerator: $(yaml "$accelerator")
              cloud.google.com/gke-tpu-topology: $(yaml "$topology")
${spot:+              cloud.google.com/gke-spot: 'true'
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: 'true'
              effect: NoSchedule
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
  manifest "${train[@]}"
else
  manifest "${train[@]}" | kubectl apply -f -
fi
