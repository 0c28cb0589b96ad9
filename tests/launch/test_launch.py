"""The launch scripts: their dry runs, the commands they run (with fakes of gcloud, kubectl and srun), and local processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.launch_scripts import ROOT, TRAIN, launch, split_commands

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh") if os.access(path, os.X_OK))
LOCATION = ["--name", "pod", "--zone", "us-west4-a", "--project", "mine"]
CREATE = ["--create", "--accelerator-type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]
GKE = ["--name", "pod", "--image", "registry/team/train:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "2x2"]
FULL_ARGUMENTS = {
    "tpu_vm": [*LOCATION, *CREATE, "--spot", "--", *TRAIN],
    "multislice": [*LOCATION, *CREATE, "--slices", "2", "--", *TRAIN],
    "gke_jobset": [*GKE, "--", *TRAIN],
    "slurm": TRAIN,
    "local_pod": ["2", "4", "--", *TRAIN],
}


def add_fake_command(folder: Path, name: str, code: str = "") -> str:
    """Write a fake command that records its arguments and runs `code`; return a PATH that finds it first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"""#!/bin/bash\nprintf '%s\\0' {name} "$@" $'\\x1e' >>{folder}/calls\n{code}\n""")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def read_calls(folder: Path) -> list[list[str]]:
    """Return the commands that the fakes recorded.

    Several may run side by side. Bash writes a record at once if it has no line break, so records end otherwise.
    """
    return [record.split("\0")[:-1] for record in (folder / "calls").read_text().split("\x1e\0")[:-1]]


def test_every_script_is_tested():
    assert [name.removesuffix(".sh") for name in SCRIPTS] == sorted(FULL_ARGUMENTS)


@pytest.mark.parametrize("name", FULL_ARGUMENTS)
def test_help_names_the_script_and_the_dry_run(name):
    done = launch(name, "--help")
    assert done.returncode == 0
    assert f"launch/{name}.sh" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("tpu_vm", [], "--name is missing"),
        ("tpu_vm", ["--name"], "--name needs a value"),
        ("tpu_vm", ["--name=", "--zone"], "--name needs a value"),
        ("tpu_vm", ["--zone", "z", "--name", "--dry-run", "--create"], "--name needs a value"),
        ("tpu_vm", [*LOCATION, "--", *TRAIN, "--dry-run"], "--dry-run is among the arguments of the train command"),
        ("tpu_vm", ["--spot=yes"], "unknown argument --spot=yes"),
        ("tpu_vm", [*LOCATION, *CREATE, "--", "no.yaml"], "no.yaml: no such file in "),
        ("tpu_vm", ["--size", "3"], "unknown argument --size"),
        ("tpu_vm", [*LOCATION, "--"], "-- CONFIG.yaml is missing"),
        ("tpu_vm", [*LOCATION, "--create", "--", *TRAIN], "--accelerator-type is missing"),
        ("tpu_vm", [*LOCATION, "--spot", "--", *TRAIN], "--accelerator-type, --version and --spot are only used with"),
        ("tpu_vm", [*LOCATION, "--", "no.yaml"], "no.yaml: no such file in "),
        ("tpu_vm", [*LOCATION, "--slices", "2", "--", *TRAIN], "unknown argument --slices"),
        ("multislice", [*LOCATION, *CREATE, "--", *TRAIN], "--slices is missing"),
        (
            "multislice",
            [*LOCATION, "--slices", "2", "--spot", "--", *TRAIN],
            "--accelerator-type, --version and --spot are",
        ),
        (
            "multislice",
            [*LOCATION, *CREATE, "--slices", "1", "--", *TRAIN],
            "--slices: expected 2 or more (found 1)",
        ),
        ("gke_jobset", [*GKE, "--name", "My_Pod", "--", *TRAIN], "--name: 'My_Pod' is not a valid name (expected a letter"),
        ("gke_jobset", [*GKE, "--name", "p" * 46, "--", *TRAIN], f"--name: '{'p' * 46}' is not a valid name"),
        ("gke_jobset", [*GKE, "--name", "7b", "--", *TRAIN], "--name: '7b' is not a valid name (expected a letter"),
        ("gke_jobset", [*GKE, "--accelerator=v5litepod-16", "--", *TRAIN], "--accelerator: 'v5litepod-16' is not a GKE"),
        ("gke_jobset", [*GKE, "--topology", "16", "--", *TRAIN], "--topology: '16' does not fit tpu-v5-lite-podslice"),
        ("gke_jobset", [*GKE, "--topology", "2x2x4", "--", *TRAIN], "--topology: '2x2x4' does not fit tpu-v5-lite-podslice"),
        (
            "gke_jobset",
            [*GKE, "--topology", "2x2", "--slices=2", "--", *TRAIN],
            "--slices: GKE joins only slices of several hosts (2 slices, but --topology 2x2 has one host)",
        ),
        ("gke_jobset", [*GKE, "--slices", "--", *TRAIN], "--slices needs a value"),
        ("gke_jobset", [*GKE, "--", "no.yaml"], f"no.yaml: no such file in {ROOT} (the image contains this checkout)"),
        (
            "gke_jobset",
            [*GKE, "--topology", "3x3", "--", *TRAIN],
            "--topology: the chips of 3x3 are not divisible by",
        ),
        ("gke_jobset", [*GKE, "--restarts", "-1", "--", *TRAIN], "--restarts needs a value"),
        ("gke_jobset", [*GKE, "--restarts", "few", "--", *TRAIN], "--restarts: 'few' is not a non-negative integer"),
        (
            "gke_jobset",
            [*GKE, "--topology", "4x4", "--", *TRAIN],
            "--claim is missing: the 4 hosts need a shared folder for run.dir",
        ),
        ("gke_jobset", [*GKE, "--slices", "0", "--", *TRAIN], "--slices: '0' is not a positive integer"),
        ("slurm", [], "CONFIG.yaml is missing"),
        ("slurm", ["no.yaml"], "no.yaml: no such config file"),
        ("slurm", TRAIN, "not in a Slurm job. Submit this script with sbatch"),
        ("slurm", [*TRAIN, "--dry-run"], "--dry-run is among the arguments of the train command"),
        ("local_pod", ["--module", "--dry-run", "2", "4", "--", *TRAIN], "--module needs a value"),
        ("local_pod", ["2", "-1", "--", *TRAIN], "DEVICES_EACH: '-1' is not a positive integer"),
        ("local_pod", ["2", "2", *TRAIN], "-- CONFIG.yaml is missing"),
        ("local_pod", ["2", "2", "--", *TRAIN], "no-python: no such command. Activate the environment"),
    ],
)
def test_bad_arguments_are_reported_in_one_line(name, args, message):
    done = launch(name, *args, SLURM_JOB_ID="", PYTHON="no-python")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["tpu_vm", "multislice"])
def test_dry_run_prints_the_gcloud_commands_of_a_real_run(name, tmp_path):
    printed = split_commands(launch(name, "--dry-run", *FULL_ARGUMENTS[name], TMPDIR=str(tmp_path)).stdout)
    assert not list(tmp_path.iterdir())
    keep = f'[[ $* != *" scp "* ]] || {{ ls -ld "${{5%/*}}" >{tmp_path}/mode; cp "$5" {tmp_path}/copy.tar.gz; }}'
    path = add_fake_command(tmp_path / "bin", "gcloud", f"[[ $* != *describe* ]] || echo ACTIVE; {keep}")
    done = launch(name, *FULL_ARGUMENTS[name], TMPDIR=str(tmp_path), PATH=path)
    assert done.returncode == 0, done.stderr
    calls = [c for c in read_calls(tmp_path / "bin") if "describe" not in c]
    done = [[re.sub(r"/jaxembed\.\w{8}/", "/jaxembed.XXXXXXXX/", word) for word in call] for call in calls]
    assert done != calls, "the name of the archive's folder is random"
    assert sorted(done) == sorted(c for c in printed if c[0] == "gcloud")  # several slices start at once
    assert done[:3] == [c for c in printed if c[0] == "gcloud"][:3]
    assert (tmp_path / "mode").read_text().startswith("drwx------"), "nobody else can read the archive"
    assert not list(tmp_path.glob("jaxembed*")), "the archive is removed"
    with tarfile.open(tmp_path / "copy.tar.gz") as archive:
        names = set(archive.getnames())
    assert {
        "./pyproject.toml",
        "./constraints.txt",
        "./jaxembed/train.py",
        "./jaxembed/runs/train.py",
        "./configs/lora.yaml",
    } <= names
    assert not [n for n in names if n.startswith(("./.git/", "./.venv", "./runs")) or "__pycache__" in n]


def test_local_pod_rejects_a_missing_config():
    done = launch("local_pod", "--dry-run", "2", "4", "--", "no.yaml")
    assert (done.returncode, done.stderr.startswith("error: no.yaml: no such config file")) == (2, True)


def test_tpu_vm_commands():
    create, pack, copy, install, train = split_commands(launch("tpu_vm", "--dry-run", *FULL_ARGUMENTS["tpu_vm"]).stdout)
    location, tpu = ["--zone=us-west4-a", "--project=mine"], ["gcloud", "compute", "tpus", "tpu-vm"]
    options = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert create == [*tpu, "create", "pod", *location, *options]
    assert copy == [*tpu, "scp", pack[2], "pod:jaxembed.tar.gz", *location, "--worker=all"]
    assert install[:-1] == train[:-1] == [*tpu, "ssh", "pod", *location, "--worker=all"]
    assert "-c constraints.txt '.[tpu]'" in install[-1]
    remote = shlex.split(train[-1].removeprefix("--command="))
    assert remote == ["cd", "jaxembed", "&&", ".venv/bin/python", "-m", "jaxembed.train", *TRAIN]


def test_tpu_vm_creates_without_training_and_accepts_an_absolute_config_path():
    create, *_ = split_commands(launch("tpu_vm", "--dry-run", *FULL_ARGUMENTS["tpu_vm"]).stdout)
    assert split_commands(launch("tpu_vm", "--dry-run", *LOCATION, *CREATE, "--spot").stdout) == [create]
    [_, copy, *_, train] = split_commands(launch("tpu_vm", "--dry-run", *LOCATION, "--", f"{ROOT}/configs/lora.yaml").stdout)
    assert "scp" in copy
    assert shlex.split(train[-1])[-1] == "configs/lora.yaml"


def test_multislice_commands():
    create, _, copy, install, *train = split_commands(launch("multislice", "--dry-run", *FULL_ARGUMENTS["multislice"]).stdout)
    wanted = {"--node-count=2", "--node-prefix=pod", "--runtime-version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-16"}
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert wanted <= set(create)
    for command in (copy, install):
        assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(command)
    for number, command in enumerate(train):  # gcloud does not start all workers of many slices at once
        assert command[3:6] == ["tpu-vm", "ssh", f"pod-{number}"]
        assert command[-1].startswith("--command=cd jaxembed && .venv/bin/python -m jaxembed.train configs/lora.yaml")
    assert len(train) == 2


def test_multislice_exits_with_the_code_of_the_slice_that_failed(tmp_path):
    path = add_fake_command(
        tmp_path / "bin",
        "gcloud",
        "[[ $* != *describe* ]] || echo ACTIVE; [[ $* != *jaxembed.train*  || $* != *pod-0* ]] || exit 7",
    )
    assert launch("multislice", *FULL_ARGUMENTS["multislice"], PATH=path, TMPDIR=str(tmp_path)).returncode == 7


def test_multislice_stops_waiting_when_the_request_fails(tmp_path):
    path = add_fake_command(tmp_path / "bin", "gcloud", "[[ $* != *describe* ]] || echo FAILED")
    done = launch("multislice", *FULL_ARGUMENTS["multislice"], PATH=path)
    assert (done.returncode, done.stderr) == (1, "error: pod is FAILED\n")


# Schema of the fields that the JobSet controller and GKE read. A value is a type, a mapping of keys to schemas, a list of one
# schema (for all items), or a tuple of schemas (one per item).
CONTAINER = {
    "name": str, "image": str, "command": [str], "args": [str], "ports": [{"containerPort": int}],
    "resources": {"limits": {"google.com/tpu": int}, "requests": {"google.com/tpu": int}},
}  # fmt: skip
SELECTOR = {"cloud.google.com/gke-tpu-accelerator": str, "cloud.google.com/gke-tpu-topology": str}
POD = {"restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": SELECTOR, "containers": [CONTAINER]}
PREEMPTION_RULE = {"action": str, "onPodConditions": [{"type": str, "status": str}]}
SAVED_RULE = {"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}
JOB = {
    "parallelism": int, "completions": int, "backoffLimit": int, "podFailurePolicy": {"rules": (PREEMPTION_RULE, SAVED_RULE)},
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
CLAIM_FIELDS = {"volumeMounts": [{"name": str, "mountPath": str}], "env": [{"name": str, "value": str}]}


def check_schema(value: Any, schema: Any, where: str = "") -> None:
    if isinstance(schema, Mapping):
        assert set(value) == set(schema), where
        for key, inner in schema.items():
            check_schema(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for item in value:
            check_schema(item, schema[0], f"{where}[]")
    elif isinstance(schema, tuple):
        for item, inner in zip(value, schema, strict=True):
            check_schema(item, inner, f"{where}[]")
    else:
        assert type(value) is schema, where


def test_gke_manifest_of_one_slice(tmp_path):
    printed = launch("gke_jobset", "--dry-run", *FULL_ARGUMENTS["gke_jobset"]).stdout
    tree = yaml.safe_load(printed)
    check_schema(tree, JOBSET)
    assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [job] = tree["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, 1, 1, 0)
    [container] = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "jaxembed.train"]
    assert container["args"] == TRAIN
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    path = add_fake_command(tmp_path / "bin", "kubectl", f"cat >{tmp_path}/applied")
    assert launch("gke_jobset", *FULL_ARGUMENTS["gke_jobset"], PATH=path).returncode == 0
    assert read_calls(tmp_path / "bin") == [["kubectl", "apply", "-f", "-"]]
    assert (tmp_path / "applied").read_text() == printed


def test_gke_manifest_of_several_slices_with_a_claim():
    options = [
        "--topology=4x4",
        "--slices=3",
        "--chips",
        "8",
        "--claim=team.shared",
        "--restarts=0",
        "--spot",
        "--namespace=team",
    ]
    tree = yaml.safe_load(launch("gke_jobset", "--dry-run", *GKE, *options, "--", *TRAIN).stdout)
    spot = {**SELECTOR, "cloud.google.com/gke-spot": str}
    claim = [{"name": str, "persistentVolumeClaim": {"claimName": str}}]
    tolerations = [{"key": str, "operator": str, "value": str, "effect": str}]
    pod = {
        **POD,
        "nodeSelector": spot,
        "tolerations": tolerations,
        "containers": [{**CONTAINER, **CLAIM_FIELDS}],
        "volumes": claim,
    }
    [job] = tree["spec"]["replicatedJobs"]
    check_schema(job["template"]["spec"]["template"]["spec"], pod)
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (3, 2, 2, 0)
    assert tree["metadata"]["namespace"] == "team"
    assert tree["spec"]["failurePolicy"]["maxRestarts"] == 0


@pytest.mark.parametrize(
    "argument",
    ["run.name=a\n---\nb", "a\n...\n", "it's", 'say "x"', "back\\slash\nn", "\ttab", "a: b # c", "$(HOME) $$ $x", "é\r\n", ""],
)
def test_every_argument_reaches_the_container_of_a_manifest(argument):
    """Kubernetes reads $$ as $, and replaces $(NAME)."""
    printed = launch("gke_jobset", "--dry-run", *GKE, "--topology=2x2", "--", *TRAIN, argument).stdout
    [job] = yaml.safe_load(printed)["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["args"][-1].replace("$$", "$") == argument
    assert "$" not in container["args"][-1].replace("$$", "")


def test_slurm_starts_one_task_per_gpu(tmp_path):
    [printed] = split_commands(launch("slurm", "--dry-run", *TRAIN).stdout)
    assert printed == ["srun", "--gpu-bind=none", sys.executable, "-m", "jaxembed.train", *TRAIN]
    path = add_fake_command(tmp_path / "bin", "srun", 'echo "$SRUN_CPUS_PER_TASK"; exit 143')
    job = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "JAX_PLATFORMS": "cpu"}
    done = launch("slurm", *TRAIN, **job, SLURM_NTASKS_PER_NODE="4", SLURM_CPUS_PER_TASK="8")
    assert (done.returncode, done.stdout) == (143, "8\n")
    assert read_calls(tmp_path / "bin") == [printed]
    done = launch("slurm", *TRAIN, **job, SLURM_NTASKS_PER_NODE="1")
    assert (done.returncode, done.stderr.startswith("error: 1 tasks per node, but 4 GPUs")) == (2, True)
    add_fake_command(tmp_path / "bin", "python", "exit 1")  # fails to import jax_plugins
    done = launch("slurm", *TRAIN, **job | {"JAX_PLATFORMS": "", "PYTHON": "python"}, SLURM_NTASKS_PER_NODE="4")
    assert (done.returncode, done.stderr.startswith("error: python has no JAX for GPUs and would train on CPUs")) == (2, True)
    directives = [line for line in (ROOT / "launch" / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=TERM@120" in directives


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [found, "-x", "-P", "SCRIPTDIR", *sorted((ROOT / "launch").glob("*.sh"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
