"""Several processes, for real: they train one model, stop, fail and end together, and any number of them goes on."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from helpers.runs import ENV, prepare, rewound, settings, staged
from jaxembed import config
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices import processes
from jaxembed.formats.weights import save_params
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.families import from_hf
from jaxembed.runs.train import train
from jaxembed.training.checkpoint import Checkpoints
from jaxembed.training.metrics import read_metrics

POD = Path(__file__).parents[2] / "launch" / "local_pod.sh"
STALL = 30.0  # seconds in which a run of which a process is lost must end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> list[dict[str, float]]:
    """What one process with eight devices logs; for the last steps it mines negatives with the model it has by then."""
    train(mining(folder, "straight", "mesh.data=8", "train.keep_checkpoints=9"))
    return read_metrics(folder / "straight")


def mining(root: Path, run: str, *overrides: str) -> config.Config:
    """The config of `runs.settings` in two stages, with negatives mined for the second."""
    mined = {"train": {"steps": 4}, "mine": {"rule": "top_k", "negatives": 3}}
    return staged(root, run, [{"train": {"steps": 8}}, mined], *overrides)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def start_all(command: Sequence[str], root: Path, count: int, devices: int) -> list[subprocess.Popen[str]]:
    """The command as so many processes of one run, each with so many devices."""
    address, children = f"127.0.0.1:{free_port()}", []
    for i in range(count):
        flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", ENV["XLA_FLAGS"])
        of_group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        env = {**ENV, **of_group, "XLA_FLAGS": flags, "JAXEMBED_CACHE": str(root / "cache")}
        pipe = subprocess.PIPE
        children.append(subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe))
    return children


def launch(root: Path, run: str, *overrides: str, written: Callable[..., Any] = settings) -> list[subprocess.Popen[str]]:
    """The train command on a run's config, as two processes with four devices each."""
    written(root, run, *overrides)
    command = [sys.executable, "-m", "jaxembed.train", str(root / f"{run}.yaml"), f"run.dir={root / run}", *overrides]
    return start_all(command, root, count=2, devices=4)


def signal_at(run: Path, step: int, processes: Sequence[subprocess.Popen[str]], which: int, number: int) -> None:
    """Sends one of the processes a signal as soon as the run has logged a step."""
    while all(p.poll() is None for p in processes) and max((row["step"] for row in read_metrics(run)), default=0) < step:
        time.sleep(0.01)
    processes[which].send_signal(number)


def whole_steps(run: Path) -> list[int]:
    """The steps of a run whose checkpoints are whole."""
    checkpoints = Checkpoints(run)
    steps = checkpoints.steps()
    assert not [step for step in steps if checkpoints._damage(step)]
    checkpoints.close()
    return steps


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_metrics(run)), default=0)


def assert_same(run: Path, wanted: Sequence[dict[str, float]]) -> None:
    """That a run logged the numbers of another, as near as float32 is on other devices: it saw the same examples."""
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for name in ("loss", "grad_norm", "padding_fraction", "eval/sts/spearman"):
        ours, theirs = ([row[name] for row in of_run if name in row] for of_run in (rows, wanted))
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)


def test_two_processes_go_on_where_one_left_off_and_end_as_it_does(folder: Path, straight: list[dict[str, float]]) -> None:
    """As launch/local_pod.sh starts them."""
    run = folder / "two"
    overrides = ("mesh.data=8", "train.keep_checkpoints=9")
    assert rewound(folder / "straight", mining(folder, "two", *overrides)) == 4
    python, out = folder / "python", folder / "printed"  # the script throws away what others than the first process print
    python.write_text(
        f'#!/bin/bash\n[[ -z ${{JAX_PROCESS_ID-}} ]] || exec >"{out}.$JAX_PROCESS_ID"\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    command = ["bash", str(POD), "2", "4", "--", str(folder / "two.yaml"), f"run.dir={run}", *overrides]
    env = {**ENV, "PYTHON": str(python), "JAXEMBED_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result, nothing = (Path(f"{out}.{i}").read_text() for i in range(2))
    assert json.loads(result.splitlines()[-1])["step"] == 12
    told = [line for line in done.stderr.splitlines() if line.startswith("[1]")]
    assert "{" not in nothing and not told, "the first process alone writes and logs"
    assert_same(run, straight)
    assert whole_steps(run) == [4, 6, 8, 12]
    (mined,) = (run / "mined").glob("*.jsonl")
    assert mined.read_bytes() == (folder / "straight" / "mined" / mined.name).read_bytes()


def test_sigterm_to_one_stops_all_at_one_step_and_one_device_goes_on(folder: Path, straight: list[dict[str, float]]) -> None:
    run = folder / "stopped"
    processes = launch(folder, "stopped", "mesh.data=8", written=mining)
    signal_at(run, 2, processes, 1, signal.SIGTERM)
    told = [process.communicate()[1].splitlines()[-1] for process in processes]
    step = last_step(run)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    assert told == [f"stopped: saved after step {step} of 12; the same command goes on"] * 2
    assert whole_steps(run)[-1] == step < 12
    train(mining(folder, "stopped", "mesh.data=1"))
    assert_same(run, straight)


@pytest.mark.parametrize(
    ("number", "which"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 0)]
)
def test_a_process_that_dies_or_hangs_ends_the_others_in_time(folder: Path, number: int, which: int) -> None:
    run = folder / "lost"  # each goes on where the one before ended
    before = last_step(run)
    processes = launch(folder, "lost", "mesh.data=8", "train.steps=5000", "eval.sets=[]", f"train.stall_timeout_s={STALL}")
    signal_at(run, before + 6, processes, which, number)
    began, other = time.monotonic(), processes[1 - which]
    told = other.communicate(timeout=2 * STALL)[1].splitlines()
    assert time.monotonic() - began < STALL
    processes[which].kill()
    processes[which].communicate()
    assert other.returncode == 1, told
    silent = f"process {which} of 2 has not been heard of"
    # Of one that is killed, JAX tells unless the other is not waiting for it; then its beats are missed, as of one that hangs
    lost = f"another process has ended|aborted, as JAX does|{silent}" if number == signal.SIGKILL else silent
    errors = [line for line in told if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(f"error: ({lost})", errors[0])
    reached, kept = last_step(run), whole_steps(run)[-1]
    assert 0 < reached - kept <= 2 * 4, "a checkpoint is written every 4 steps; one may be on its way"


# Each of two processes loads a model that is split over both, while a thread samples its anonymous memory.
LOADING = """
import json, sys, threading, time
from pathlib import Path
import jax
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices import processes
from jaxembed.hub.restore import shapes_and_shardings
from jaxembed.formats.weights import load_params
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.families import from_hf
from jaxembed.config.spec import EmbeddingSpec

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def sample():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.002)

def load(folder):
    config = from_hf(json.loads((folder / "config.json").read_text()), str(folder))
    trees = shapes_and_shardings(EmbeddingModel(config, EmbeddingSpec()), make_mesh(1, 2))
    return load_params(folder, config.layers, *({"decoder": tree["decoder"]} for tree in trees))

big, small = map(Path, sys.argv[1:])
with processes.together(100):
    load(small)
    done, before, peaks = False, anonymous(), []
    thread = threading.Thread(target=sample)
    thread.start()
    leaves = jax.tree.leaves(load(big))
    done = True
    thread.join()
    own = sum(leaf.addressable_data(0).nbytes for leaf in leaves)
    sums = [float(leaf.sum()) for leaf in leaves]
    print(json.dumps([sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves), own, max(peaks) - before, sums]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_each_process_loads_its_part_of_the_weights(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    sizes = {"vocab_size": 30_000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}
    config = json.loads((base_folder("llama") / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    boxed = parameter_shapes(EmbeddingModel(from_hf(config, "test"), EmbeddingSpec()))["decoder"]
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), nn.unbox(boxed))
    save_params(tmp_path / "model.safetensors", {"decoder": drawn}, {"decoder": ""}, lambda x: x)
    command = [sys.executable, "-c", LOADING, str(tmp_path), str(base_folder("llama"))]
    children = start_all(command, tmp_path, count=2, devices=1)
    reports = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    for total, largest, own, peak, sums in reports:
        assert total > 50e6 and own < 0.51 * total
        assert peak < total / 2 + largest
        np.testing.assert_allclose(sums, [leaf.sum() for leaf in jax.tree.leaves(drawn)], rtol=1e-4)


def test_what_ends_a_process_is_told_alike_by_whichever_of_its_threads_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts, told = [], []
    monkeypatch.setattr(processes, "_set", lambda key, value: verdicts.append(value))
    monkeypatch.setattr(processes, "_exit", lambda code, line: told.append((code, line)))
    for index in (0, 1):
        monkeypatch.setattr(processes, "_group", processes._Group(index, 2))
        if index == 0:
            processes._end_all(1, "the loss is not finite")
        processes._obey(verdicts[0])
    own = (1, "the loss is not finite")
    assert told == [own, own, (1, "process 0 of 2: the loss is not finite")]
