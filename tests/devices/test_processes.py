"""Real groups of processes: they train one model, stop and fail together, and any number of processes resumes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from helpers.commands import ENV, Process, run_module
from helpers.process_groups import start_all
from helpers.runs import copy_run_at_first_checkpoint, make_config, make_staged_config, write_base_and_data
from jaxembed import config
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.formats.checkpoints import CheckpointReader
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.formats.weights import save_params
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics

LOCAL_POD_SCRIPT = Path(__file__).parents[2] / "launch" / "local_pod.sh"
STALL_TIMEOUT_S = 45.0  # a run that loses a process must end within this time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> list[dict[str, float]]:
    """Train uninterrupted, in one process with four devices, and return its metrics."""
    train(write_mining_config(folder, "straight", "mesh.data=4", "train.keep_checkpoints=9"))
    return read_metrics(folder / "straight")


def write_mining_config(root: Path, run: str, *overrides: str) -> config.Config:
    """Write a config with two stages. The second mines negatives with the model that the first has trained."""
    mining_stage = {"train": {"steps": 4}, "mine": {"rule": "top_k", "negatives": 3, "consistency_top_k": 20}}
    return make_staged_config(root, run, [{"train": {"steps": 8}}, mining_stage], *overrides)


def start_training(
    root: Path, run: str, *overrides: str, devices: int, write_config: Callable[..., Any] = make_config
) -> list[Process]:
    """Start the train command as two processes."""
    write_config(root, run, *overrides)
    arguments = [str(root / f"{run}.yaml"), f"run.dir={root / run}", *overrides]
    return start_all(run_module("jaxembed.train"), arguments, root, 2, devices)


def signal_at_step(run: Path, step: int, processes: Sequence[Process], index: int, number: int) -> None:
    """Send a signal to one of the processes as soon as the run has logged a step."""
    while all(process.poll() is None for process in processes) and last_step(run) < step:
        time.sleep(0.01)
    processes[index].send_signal(number)


def intact_steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint, and assert that all of these are intact."""
    checkpoints = CheckpointReader(run)
    steps = checkpoints.list_steps()
    assert not [step for step in steps if checkpoints.find_damage(step)]
    checkpoints.close()
    return steps


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_metrics(run)), default=0)


def assert_same_metrics(run: Path, expected: Sequence[dict[str, float]]) -> None:
    """Assert that a run saw the same examples as another: its metrics agree to float32 rounding."""
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in ("loss", "grad_norm", "padding_fraction", "eval/sts/spearman"):
        actual, desired = ([row[name] for row in metrics if name in row] for metrics in (rows, expected))
        np.testing.assert_allclose(actual, desired, rtol=2e-4)


@dataclasses.dataclass(frozen=True)
class BrokenGroup:
    """Two processes that train. The one at index `lost` has been sent a signal."""

    run: Path
    processes: list[Process]
    lost: int
    signal_time: float


def break_groups(folder: Path, number: int) -> list[BrokenGroup]:
    """Start two groups of processes. Send a signal to the first process of one, and to the second of the other."""
    overrides = ("mesh.data=2", "train.steps=5000", "eval.sets=[]", f"train.stall_timeout_s={STALL_TIMEOUT_S}")
    groups = []
    for lost in (0, 1):
        run = folder / f"lost{lost}"
        first_step = last_step(run)  # a run that exists is resumed
        processes = start_training(folder, run.name, *overrides, devices=1)
        signal_at_step(run, first_step + 6, processes, lost, number)
        groups.append(BrokenGroup(run, processes, lost, time.time()))
    return groups


@pytest.fixture(scope="module")
def groups_that_hang(folder: Path) -> Iterator[list[BrokenGroup]]:
    """Groups in which a process hangs. The others wait for it until the time limit, while the first tests run."""
    groups = break_groups(folder, signal.SIGSTOP)
    yield groups
    for process in itertools.chain.from_iterable(group.processes for group in groups):
        if process.poll() is None:
            process.kill()


@pytest.mark.usefixtures("groups_that_hang")
def test_two_processes_resume_the_run_of_one_with_the_same_result(folder: Path, straight: list[dict[str, float]]) -> None:
    """The processes are started by launch/local_pod.sh."""
    run = folder / "two"
    overrides = ("mesh.data=4", "train.keep_checkpoints=9")
    assert copy_run_at_first_checkpoint(folder / "straight", write_mining_config(folder, "two", *overrides)) == 4
    # The script discards the standard output of all processes but the first: this interpreter keeps it.
    python, out = folder / "python", folder / "printed"
    python.write_text(
        f'#!/bin/bash\n[[ -z ${{JAX_PROCESS_ID-}} ]] || exec >"{out}.$JAX_PROCESS_ID"\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    command = ["bash", str(LOCAL_POD_SCRIPT), "2", "2", "--", str(folder / "two.yaml"), f"run.dir={run}", *overrides]
    env = {**ENV, "PYTHON": str(python), "JAXEMBED_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first_output, second_output = (Path(f"{out}.{i}").read_text() for i in range(2))
    assert json.loads(first_output.splitlines()[-1])["step"] == 12
    second_errors = [line for line in done.stderr.splitlines() if line.startswith("[1]")]
    assert "{" not in second_output and not second_errors, "only the first process prints and logs"
    assert_same_metrics(run, straight)
    assert intact_steps(run) == [4, 6, 8, 12]
    (mined,) = (run / "mined").glob("*.jsonl")
    assert mined.read_bytes() == (folder / "straight" / "mined" / mined.name).read_bytes()
    assert 16 <= len(mined.read_text().splitlines()) < 96  # the filter has dropped some


def test_sigterm_to_one_stops_all_at_the_same_step(folder: Path, straight: list[dict[str, float]]) -> None:
    """The run is then resumed on one device."""
    run = folder / "stopped"
    processes = start_training(folder, "stopped", "mesh.data=4", devices=2, write_config=write_mining_config)
    signal_at_step(run, 2, processes, 1, signal.SIGTERM)
    last_lines = [process.communicate()[1].splitlines()[-1] for process in processes]
    step = last_step(run)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    assert last_lines == [f"stopped: saved a checkpoint after step {step} of 12. Run the same command to resume."] * 2
    assert intact_steps(run)[-1] == step < 12
    train(write_mining_config(folder, "stopped", "mesh.data=1"))
    assert_same_metrics(run, straight)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_dies_or_hangs_ends_the_others_in_time(
    folder: Path, groups_that_hang: list[BrokenGroup], number: int
) -> None:
    """One group of two processes loses its first, another its second."""
    # The groups that lose a killed process resume the runs of those that hung.
    for group in groups_that_hang if number == signal.SIGSTOP else break_groups(folder, number):
        lost, run, survivor = group.lost, group.run, group.processes[1 - group.lost]
        lines = survivor.communicate(timeout=2 * STALL_TIMEOUT_S)[1].splitlines()
        assert survivor.last_output_time() - group.signal_time < STALL_TIMEOUT_S
        group.processes[lost].kill()
        group.processes[lost].communicate()
        assert survivor.returncode == 1, lines
        # JAX reports a killed process if the survivor is waiting for it. Else its heartbeats stop, as when it hangs.
        silent = f"process {lost} of 2 has not responded"
        expected = f"another process has ended|JAX aborted this process|{silent}" if number == signal.SIGKILL else silent
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and re.match(f"error: ({expected})", errors[0])
        lost_steps = last_step(run) - max(intact_steps(run), default=0)
        assert 0 < lost_steps <= 2 * 4, "a checkpoint is written every 4 steps, and one may be unfinished"


# Each of two processes loads a model that is sharded over both, while a thread samples its anonymous memory.
LOADING_SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import jax
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices import processes
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.formats.weights import load_params
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.config.spec import EmbeddingSpec

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def sample():
    while not is_done:
        samples.append(anonymous_bytes())
        time.sleep(0.002)

def load(folder):
    config = parse_hf_config(json.loads((folder / "config.json").read_text()), str(folder))
    trees = compute_shapes_and_shardings(EmbeddingModel(config, EmbeddingSpec()), make_mesh(1, 2))
    return load_params(folder, config, *({"decoder": tree["decoder"]} for tree in trees))

big, small = map(Path, sys.argv[1:])
with processes.process_group(100):
    load(small)
    is_done, before, samples = False, anonymous_bytes(), []
    thread = threading.Thread(target=sample)
    thread.start()
    leaves = jax.tree.leaves(load(big))
    is_done = True
    thread.join()
    own = sum(leaf.addressable_data(0).nbytes for leaf in leaves)
    sums = [float(leaf.sum()) for leaf in leaves]
    print(json.dumps([sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves), own, max(samples) - before, sums]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_each_process_loads_its_shard_of_the_weights(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    sizes = {"vocab_size": 30_000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}
    config = json.loads((base_folder("llama") / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    boxed = infer_parameter_shapes(EmbeddingModel(parse_hf_config(config, "test"), EmbeddingSpec()))["decoder"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), nn.unbox(boxed))
    save_params(tmp_path / "model.safetensors", {"decoder": params}, {"decoder": ""}, lambda x: x)
    children = start_all(LOADING_SCRIPT, [str(tmp_path), str(base_folder("llama"))], tmp_path, count=2, devices=1)
    reports = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    for total, largest, own, peak, sums in reports:
        assert total > 50e6 and own < 0.51 * total
        assert peak < total / 2 + largest
        np.testing.assert_allclose(sums, [leaf.sum() for leaf in jax.tree.leaves(params)], rtol=1e-4)
