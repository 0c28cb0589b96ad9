"""The launch scripts: what they would run, what they run (of stand-ins for gcloud, kubectl and srun), and processes here."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh") if os.access(path, os.X_OK))
PLACE = ["--name", "pod", "--zone", "us-west4-a", "--project", "mine"]
MADE = ["--create", "--accelerator-type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]
GKE = ["--name", "pod", "--image", "registry/team/train:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "2x2"]
TRAIN = ["configs/lora.yaml", "model.base=my base", """model.query_suffix="it's\\n" """]
WHOLE = {
    "tpu_vm": [*PLACE, *MADE, "--spot", "--", *TRAIN],
    "multislice": [*PLACE, *MADE, "--slices", "2", "--", *TRAIN],
    "gke_jobset": [*GKE, "--", *TRAIN],
    "slurm": TRAIN,
    "local_pod": ["2", "4", "--", *TRAIN],
}


def launch(name: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(["bash", f"launch/{name}.sh", *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def stand_in(folder: Path, name: str, does: str = "") -> str:
    """Puts a command of this name, which notes its arguments, before all others; returns the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"""#!/bin/bash\nprintf '%s\\0' {name} "$@" >>{folder}/ran\necho >>{folder}/ran\n{does}\n""")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def ran(folder: Path) -> list[list[str]]:
    """The commands that stand-ins noted."""
    return [line.split("\0")[:-1] for line in (folder / "ran").read_text().splitlines()]


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines()]


def test_every_script_is_here():
    assert [name.removesuffix(".sh") for name in SCRIPTS] == sorted(WHOLE)


@pytest.mark.parametrize("name", WHOLE)
def test_help(name):
    done = launch(name, "--help")
    assert done.returncode == 0
    assert f"launch/{name}.sh" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("tpu_vm", [], "--name is missing"),
        ("tpu_vm", ["--name"], "--name needs a value"),
        ("tpu_vm", ["--name=", "--zone"], "--name needs a value"),
        ("tpu_vm", ["--zone", "z", "--name", "--dry-run", "--create"], "--name needs a value"),
        ("tpu_vm", [*PLACE, "--", *TRAIN, "--dry-run"], "--dry-run is among the train command's arguments"),
        ("tpu_vm", ["--spot=yes"], "unknown argument --spot=yes"),
        ("tpu_vm", [*PLACE, *MADE, "--", "no.yaml"], "no.yaml: no such file in "),
        ("tpu_vm", ["--size", "3"], "unknown argument --size"),
        ("tpu_vm", [*PLACE, "--"], "-- CONFIG.yaml is missing"),
        ("tpu_vm", [*PLACE, "--create", "--", *TRAIN], "--accelerator-type is missing"),
        ("tpu_vm", [*PLACE, "--spot", "--", *TRAIN], "--accelerator-type, --version and --spot are of a TPU that --create"),
        ("tpu_vm", [*PLACE, "--", "no.yaml"], "no.yaml: no such file in "),
        ("tpu_vm", [*PLACE, "--slices", "2", "--", *TRAIN], "unknown argument --slices"),
        ("multislice", [*PLACE, *MADE, "--", *TRAIN], "--slices is missing"),
        ("multislice", [*PLACE, "--slices", "2", "--spot", "--", *TRAIN], "--accelerator-type, --version and --spot are of a"),
        ("multislice", [*PLACE, *MADE, "--slices", "1", "--", *TRAIN], "--slices is 1; one slice is for launch/tpu_vm.sh"),
        ("gke_jobset", [*GKE, "--name", "My_Pod", "--", *TRAIN], "--name is 'My_Pod'; expected up to 45 lower-case"),
        ("gke_jobset", [*GKE, "--name", "p" * 46, "--", *TRAIN], f"--name is '{'p' * 46}'; expected up to 45 lower-case"),
        ("gke_jobset", [*GKE, "--name", "7b", "--", *TRAIN], "--name is '7b'; expected up to 45 lower-case letters"),
        ("gke_jobset", [*GKE, "--accelerator=v5litepod-16", "--", *TRAIN], "--accelerator is 'v5litepod-16'; expected GKE's"),
        ("gke_jobset", [*GKE, "--topology", "16", "--", *TRAIN], "--topology is '16'; expected 2 numbers of chips"),
        ("gke_jobset", [*GKE, "--topology", "2x2x4", "--", *TRAIN], "--topology is '2x2x4'; expected 2 numbers of chips"),
        (
            "gke_jobset",
            [*GKE, "--topology", "2x2", "--slices=2", "--", *TRAIN],
            "--slices is 2, but --topology 2x2 has one host",
        ),
        ("gke_jobset", [*GKE, "--slices", "--", *TRAIN], "--slices needs a value"),
        ("gke_jobset", [*GKE, "--", "no.yaml"], "no.yaml: no such file in "),
        ("gke_jobset", [*GKE, "--topology", "3x3", "--", *TRAIN], "--topology 3x3 is not divisible by --chips 4"),
        ("gke_jobset", [*GKE, "--restarts", "-1", "--", *TRAIN], "--restarts needs a value"),
        ("gke_jobset", [*GKE, "--restarts", "few", "--", *TRAIN], "--restarts is 'few'; expected a whole number"),
        (
            "gke_jobset",
            [*GKE, "--topology", "4x4", "--", *TRAIN],
            "--claim is missing; the 4 hosts need one folder for run.dir",
        ),
        ("gke_jobset", [*GKE, "--slices", "0", "--", *TRAIN], "--slices is '0'; expected a whole number above 0"),
        ("slurm", [], "CONFIG.yaml is missing"),
        ("slurm", ["no.yaml"], "no.yaml: no such config file"),
        ("slurm", TRAIN, "this is no Slurm job; submit it with sbatch"),
        ("slurm", [*TRAIN, "--dry-run"], "--dry-run is among the train command's arguments"),
        ("local_pod", ["--module", "--dry-run", "2", "4", "--", *TRAIN], "--module needs a value"),
        ("local_pod", ["2", "-1", "--", *TRAIN], "DEVICES_EACH is '-1'; expected a whole number above 0"),
        ("local_pod", ["2", "2", *TRAIN], "-- CONFIG.yaml is missing"),
        ("local_pod", ["2", "2", "--", *TRAIN], "no-python: no such command; activate the environment"),
    ],
)
def test_bad_arguments_are_one_line(name, args, told):
    done = launch(name, *args, SLURM_JOB_ID="", PYTHON="no-python")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {told}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["tpu_vm", "multislice"])
def test_a_dry_run_of_gcloud_prints_what_a_run_does(name, tmp_path):
    printed = commands(launch(name, "--dry-run", *WHOLE[name], TMPDIR=str(tmp_path)).stdout)
    assert not list(tmp_path.iterdir())
    path = stand_in(tmp_path / "bin", "gcloud", "[[ $* != *describe* ]] || echo ACTIVE")
    done = launch(name, *WHOLE[name], TMPDIR=str(tmp_path), PATH=path)
    assert done.returncode == 0, done.stderr
    done = [c for c in ran(tmp_path / "bin") if "describe" not in c]
    assert sorted(done) == sorted(c for c in printed if c[0] == "gcloud")  # several slices start at once
    assert done[:3] == [c for c in printed if c[0] == "gcloud"][:3]
    with tarfile.open(tmp_path / "jaxembed-pod.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"./pyproject.toml", "./constraints.txt", "./jaxembed/train.py", "./configs/lora.yaml"} <= names
    assert not [n for n in names if n.startswith(("./.git/", "./.venv", "./runs")) or "__pycache__" in n]


def test_a_local_pod_wants_a_config_that_is_there():
    done = launch("local_pod", "--dry-run", "2", "4", "--", "no.yaml")
    assert (done.returncode, done.stderr.startswith("error: no.yaml: no such config file")) == (2, True)


def test_commands_of_a_slice():
    create, pack, copy, install, train = commands(launch("tpu_vm", "--dry-run", *WHOLE["tpu_vm"]).stdout)
    place, tpu = ["--zone=us-west4-a", "--project=mine"], ["gcloud", "compute", "tpus", "tpu-vm"]
    made = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert create == [*tpu, "create", "pod", *place, *made]
    assert copy == [*tpu, "scp", pack[2], "pod:jaxembed.tar.gz", *place, "--worker=all"]
    assert install[:-1] == train[:-1] == [*tpu, "ssh", "pod", *place, "--worker=all"]
    assert "-c constraints.txt '.[tpu]'" in install[-1]
    remote = shlex.split(train[-1].removeprefix("--command="))
    assert remote == ["cd", "jaxembed", "&&", ".venv/bin/python", "-m", "jaxembed.train", *TRAIN]


def test_a_slice_may_be_made_alone_and_a_config_named_from_anywhere():
    create, *_ = commands(launch("tpu_vm", "--dry-run", *WHOLE["tpu_vm"]).stdout)
    assert commands(launch("tpu_vm", "--dry-run", *PLACE, *MADE, "--spot").stdout) == [create]
    [_, copy, *_, train] = commands(launch("tpu_vm", "--dry-run", *PLACE, "--", f"{ROOT}/configs/lora.yaml").stdout)
    assert "scp" in copy
    assert shlex.split(train[-1])[-1] == "configs/lora.yaml"


def test_commands_of_several_slices():
    create, _, copy, install, *train = commands(launch("multislice", "--dry-run", *WHOLE["multislice"]).stdout)
    wanted = {"--node-count=2", "--node-prefix=pod", "--runtime-version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-16"}
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert wanted <= set(create)
    for command in (copy, install):
        assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(command)
    for number, command in enumerate(train):  # each by its own name, for not all workers of many slices start by the resource's
        assert command[3:6] == ["tpu-vm", "ssh", f"pod-{number}"]
        assert command[-1].startswith("--command=cd jaxembed && .venv/bin/python -m jaxembed.train configs/lora.yaml")
    assert len(train) == 2


def test_a_slice_whose_training_fails_is_told_by_the_exit_code(tmp_path):
    path = stand_in(
        tmp_path / "bin",
        "gcloud",
        "[[ $* != *describe* ]] || echo ACTIVE; [[ $* != *jaxembed.train*  || $* != *pod-0* ]] || exit 7",
    )
    assert launch("multislice", *WHOLE["multislice"], PATH=path, TMPDIR=str(tmp_path)).returncode == 7


def test_slices_that_fail_end_the_wait(tmp_path):
    path = stand_in(tmp_path / "bin", "gcloud", "[[ $* != *describe* ]] || echo FAILED")
    done = launch("multislice", *WHOLE["multislice"], PATH=path)
    assert (done.returncode, done.stderr) == (1, "error: pod is FAILED\n")


# The fields that the JobSet controller and GKE read: key -> type, a mapping below, a list of one kind, or one of each in turn.
CONTAINER = {
    "name": str, "image": str, "command": [str], "args": [str], "ports": [{"containerPort": int}],
    "resources": {"limits": {"google.com/tpu": int}, "requests": {"google.com/tpu": int}},
}  # fmt: skip
SELECTOR = {"cloud.google.com/gke-tpu-accelerator": str, "cloud.google.com/gke-tpu-topology": str}
POD = {"restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": SELECTOR, "containers": [CONTAINER]}
TAKEN = {"action": str, "onPodConditions": [{"type": str, "status": str}]}
SAVED = {"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}
JOB = {
    "parallelism": int, "completions": int, "backoffLimit": int, "podFailurePolicy": {"rules": (TAKEN, SAVED)},
    "template": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": str, "kind": str,
    "metadata": {"name": str, "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [{"action": str, "onJobFailureReasons": [str]}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip
OF_A_CLAIM = {"volumeMounts": [{"name": str, "mountPath": str}], "env": [{"name": str, "value": str}]}


def follows(value: Any, schema: Any, where: str = "") -> None:
    if isinstance(schema, Mapping):
        assert set(value) == set(schema), where
        for key, inner in schema.items():
            follows(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for item in value:
            follows(item, schema[0], f"{where}[]")
    elif isinstance(schema, tuple):
        for item, inner in zip(value, schema, strict=True):
            follows(item, inner, f"{where}[]")
    else:
        assert type(value) is schema, where


def test_the_manifest_of_one_slice(tmp_path):
    printed = launch("gke_jobset", "--dry-run", *WHOLE["gke_jobset"]).stdout
    tree = yaml.safe_load(printed)
    follows(tree, JOBSET)
    assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [job] = tree["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, 1, 1, 0)
    [container] = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "jaxembed.train"]
    assert container["args"] == TRAIN
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    path = stand_in(tmp_path / "bin", "kubectl", f"cat >{tmp_path}/applied")
    assert launch("gke_jobset", *WHOLE["gke_jobset"], PATH=path).returncode == 0
    assert ran(tmp_path / "bin") == [["kubectl", "apply", "-f", "-"]]
    assert (tmp_path / "applied").read_text() == printed


def test_the_manifest_of_several_slices_on_shared_storage():
    more = ["--topology=4x4", "--slices=3", "--chips", "8", "--claim=team.shared", "--restarts=0", "--spot", "--namespace=team"]
    tree = yaml.safe_load(launch("gke_jobset", "--dry-run", *GKE, *more, "--", *TRAIN).stdout)
    spot = {**SELECTOR, "cloud.google.com/gke-spot": str}
    claim = [{"name": str, "persistentVolumeClaim": {"claimName": str}}]
    borne = [{"key": str, "operator": str, "value": str, "effect": str}]
    pod = {**POD, "nodeSelector": spot, "tolerations": borne, "containers": [{**CONTAINER, **OF_A_CLAIM}], "volumes": claim}
    [job] = tree["spec"]["replicatedJobs"]
    follows(job["template"]["spec"]["template"]["spec"], pod)
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (3, 2, 2, 0)
    assert tree["metadata"]["namespace"] == "team"
    assert tree["spec"]["failurePolicy"]["maxRestarts"] == 0


def test_slurm_starts_a_task_a_gpu(tmp_path):
    [printed] = commands(launch("slurm", "--dry-run", *TRAIN).stdout)
    assert printed == ["srun", "--gpu-bind=none", sys.executable, "-m", "jaxembed.train", *TRAIN]
    path = stand_in(tmp_path / "bin", "srun", 'echo "$SRUN_CPUS_PER_TASK"; exit 143')
    job = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "JAX_PLATFORMS": "cpu"}
    done = launch("slurm", *TRAIN, **job, SLURM_NTASKS_PER_NODE="4", SLURM_CPUS_PER_TASK="8")
    assert (done.returncode, done.stdout) == (143, "8\n")
    assert ran(tmp_path / "bin") == [printed]
    done = launch("slurm", *TRAIN, **job, SLURM_NTASKS_PER_NODE="1")
    assert (done.returncode, done.stderr.startswith("error: 1 tasks for 4 GPUs of a node")) == (2, True)
    stand_in(tmp_path / "bin", "python", "exit 1")  # to import jax_plugins
    done = launch("slurm", *TRAIN, **job | {"JAX_PLATFORMS": "", "PYTHON": "python"}, SLURM_NTASKS_PER_NODE="4")
    assert (done.returncode, done.stderr.startswith("error: python has no JAX for GPUs and would train on CPUs")) == (2, True)
    directives = [line for line in (ROOT / "launch" / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=TERM@120" in directives


def test_processes_of_a_local_pod_find_each_other(tmp_path):
    (tmp_path / "joined.py").write_text(
        "import os, sys\nimport jax\n"
        "jax.distributed.initialize(None, int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID']))\n"
        "sharding = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ('data',)), jax.P('data'))\n"
        "ones = jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: jax.numpy.ones(1))\n"
        "total = jax.jit(jax.numpy.sum)(ones)\n"
        "print(jax.local_device_count(), float(total), sys.argv[1])\n"
        "print('from', jax.process_index(), file=sys.stderr)\n"
    )
    done = launch("local_pod", "--module", "joined", "2", "3", "--", "a b", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "3 6.0 a b"), done.stderr  # Gloo's lines come before
    assert {"from 0", "[1] from 1"} <= set(done.stderr.splitlines())


WAITS = r"""
import os, signal, sys, time
me = int(os.environ["JAX_PROCESS_ID"])
def stop(number, frame):
    os.write(2, b"saved\n")  # in one piece
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if sys.argv[1] == "fail":
    time.sleep(me)
    sys.exit([0, 3, 4][me])
open(f"{sys.argv[1]}/ready-{me}", "w").close()
time.sleep(60)
"""


def test_a_local_pod_ends_as_the_first_process_that_failed(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    done = launch("local_pod", "--module", "waits", "3", "1", "--", "fail", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_processes_of_a_local_pod(number, tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    # A shell that runs the tests in the background lets its children ignore Ctrl-C.
    heeding = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv)"
    pod_of_three = ["launch/local_pod.sh", "--module", "waits", "3", "1", "--", str(tmp_path)]
    command = [sys.executable, "-c", heeding, *pod_of_three]
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    pod = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 3:
        assert pod.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(pod.pid, number)  # as a terminal's Ctrl-C, to all of its group
    _, told = pod.communicate(timeout=30)
    assert pod.returncode == 128 + number
    assert sorted(line for line in told.splitlines() if "saved" in line) == ["[1] saved", "[2] saved", "saved"]


def test_a_dry_run_of_a_local_pod():
    lines = commands(launch("local_pod", "--dry-run", *WHOLE["local_pod"], XLA_FLAGS="--other").stdout)
    assert [line[line.index("-m") :] for line in lines] == [["-m", "jaxembed.train", *TRAIN]] * 2
    environments = [dict(word.split("=", 1) for word in line[1:6]) for line in lines]
    assert [e["JAX_PROCESS_ID"] for e in environments] == ["0", "1"]
    for e in environments:
        assert (e["JAX_PLATFORMS"], e["JAX_NUM_PROCESSES"]) == ("cpu", "2")
        assert e["XLA_FLAGS"] == "--other --xla_force_host_platform_device_count=4"
        assert e["JAX_COORDINATOR_ADDRESS"] == environments[0]["JAX_COORDINATOR_ADDRESS"]


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [found, "-x", "-P", "SCRIPTDIR", *sorted((ROOT / "launch").glob("*.sh"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
