"""Runs that are killed, stopped, out of disk space, damaged, or diverging: what is lost, and how they resume."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from helpers.commands import Process
from helpers.runs import copy_run_at_first_checkpoint, make_config, read_losses, start_training, write_base_and_data
from jaxembed import Embedder
from jaxembed.data.equality import hash_text
from jaxembed.errors import UserError
from jaxembed.formats.checkpoints import CheckpointReader
from jaxembed.hub.card import read_card
from jaxembed.losses import infonce
from jaxembed.losses.objectives import VECTOR_OBJECTIVES
from jaxembed.runs.train import train
from jaxembed.training import run_dir
from jaxembed.training.metrics import read_metrics

MANY_STEPS = ("train.steps=24", "train.checkpoint_every=7", "train.eval_every=12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("unbreakable"))


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[float]:
    """The losses of a run that was never interrupted."""
    train(make_config(folder, "uninterrupted", *MANY_STEPS, "train.keep_checkpoints=9"))
    return read_losses(folder / "uninterrupted")


def list_checkpoints(run: Path) -> list[int]:
    checkpoints = CheckpointReader(run)
    steps = checkpoints.list_steps()
    checkpoints.close()
    return steps


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_metrics(run)), default=0)


def kill_when(process: Process, due: Callable[[], bool], number: int = signal.SIGKILL) -> str:
    """Sends a signal as soon as `due`; returns what the process wrote to standard error."""
    while process.poll() is None and not due():
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate()[1]


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(folder: Path, uninterrupted: list[float]) -> None:
    run, random_step = folder / "killed", random.Random(time.time_ns()).randrange(14, 21)
    moments: list[Callable[[], bool]] = [
        lambda: any(run.glob("checkpoints/*.orbax-checkpoint-tmp*")),  # while a checkpoint is written
        lambda: last_step(run) >= 12,  # the 12th step is logged, its evaluation begins
        lambda: last_step(run) >= random_step,
    ]
    for due in moments:
        process = start_training(folder, "killed", *MANY_STEPS)
        kill_when(process, due)
        assert process.returncode == -signal.SIGKILL
        reached, saved = last_step(run), max(list_checkpoints(run), default=0)
        assert reached - saved <= 2 * 7, "a checkpoint is written every 7 steps; one may be on its way"
        assert read_losses(run) == uninterrupted[:reached]
    assert saved > 0
    train(make_config(folder, "killed", *MANY_STEPS))
    assert read_losses(run) == uninterrupted
    assert len([row for row in read_metrics(run) if "untrained/sts/spearman" in row]) == 1


def test_only_the_run_itself_removes_half_written_checkpoints(folder: Path, uninterrupted: list[float]) -> None:
    """Other commands may read a run while it writes a checkpoint."""
    run, config = folder / "half", make_config(folder, "half", *MANY_STEPS)
    copy_run_at_first_checkpoint(folder / "uninterrupted", config)
    half = run / "checkpoints" / "8.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "cursor").write_text("{}")
    Embedder.load(run)
    assert list_checkpoints(run) == [7]
    assert (half / "cursor").is_file()
    train(config)
    assert read_losses(run) == uninterrupted
    assert not half.exists()


def test_sigterm_saves_the_step_and_exits(folder: Path, uninterrupted: list[float]) -> None:
    run = folder / "stopped"
    process = start_training(folder, "stopped", *MANY_STEPS)
    last_line = kill_when(process, lambda: last_step(run) >= 3, signal.SIGTERM).splitlines()[-1]
    step = last_step(run)
    assert process.returncode == 128 + signal.SIGTERM
    assert last_line == f"stopped: saved a checkpoint after step {step} of 24. Run the same command to resume."
    assert list_checkpoints(run)[-1] == step
    train(make_config(folder, "stopped", *MANY_STEPS))
    assert read_losses(run) == uninterrupted


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder: Path) -> Path:
    """Return the largest file with content; Orbax's success marker has none."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def intact(folder: Path) -> Path:
    """A run of eight steps that has ended."""
    train(make_config(folder, "intact", "train.steps=8"))
    return folder / "intact"


@pytest.mark.parametrize(
    ("item", "damage", "message"),
    [("params", flip_byte, "has changed"), ("optimizer", Path.unlink, "is missing"), ("cursor", flip_byte, "has changed")],
)
def test_a_damaged_checkpoint_is_named_with_the_previous_one(folder, intact, item, damage, message) -> None:
    run = folder / f"damaged-{item}"
    config = make_config(folder, run.name, "train.steps=8")
    shutil.copytree(intact, run)
    (run / "config.yaml").write_text(config.dump())
    expected = read_losses(run)
    older, latest = list_checkpoints(run)[-2:]
    damage(largest_file(run / "checkpoints" / str(latest) / item))
    line = rf"/{latest}: this checkpoint is damaged \({item}/.* {message}\)\. Remove it to resume from step {older}, the last"
    with pytest.raises(UserError, match=line):
        train(config)
    if item == "params":
        with pytest.raises(UserError, match=line):
            Embedder.load(run, checkpoint="last")
        Embedder.load(run, checkpoint=str(older))
    shutil.rmtree(run / "checkpoints" / str(latest))
    train(config)
    assert read_losses(run) == expected


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(folder: Path, uninterrupted: list[float]) -> None:
    run = folder / "full"
    kept = copy_run_at_first_checkpoint(folder / "uninterrupted", make_config(folder, "full", *MANY_STEPS))
    # No file can grow past that: those of checkpoints would, the one with standard error would not.
    small = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    process = start_training(folder, "full", *MANY_STEPS, setup_code=small)
    stderr = process.communicate()[1]
    assert process.returncode == 2, stderr
    line = next(line for line in stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {run}/checkpoints: a checkpoint could not be written (OUT_OF_RANGE")
    assert line.endswith(f"The last intact one is of step {kept}. Make room and run the same command.")
    train(make_config(folder, "full", *MANY_STEPS))
    assert read_losses(run) == uninterrupted


def test_a_disk_without_room_for_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=400_000))
    line = r"could not be written \(it takes 0\.5 MB, the disk has 0\.4 MB left\)\. There is no earlier one\. Make room"
    with pytest.raises(UserError, match=line):
        train(make_config(folder, "room"))


def test_an_unwritable_run_dir_is_reported_in_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc/here: cannot be written \(.*\)\. Name another run\.dir\.$"):
        train(make_config(folder, "x", "run.dir=/proc/here"))


@pytest.fixture
def diverging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Overrides that add a source of one query, in whose batches the loss is not a number."""
    (folder / "bad.jsonl").write_text(json.dumps({"query": "diverge", "pos": ["aaa"]}) + "\n")
    bad = hash_text("diverge")

    def info_nce(config, encoded):
        loss, metrics = infonce.info_nce(config, encoded)
        return loss * jnp.where((encoded.batch.query_hash == bad).all(axis=-1).any(), jnp.nan, 1.0), metrics

    monkeypatch.setitem(VECTOR_OBJECTIVES, "infonce", info_nce)
    pairs, bad_pairs = ({"path": str(folder / f"{name}.jsonl")} for name in ("pairs", "bad"))
    return (f"data.sources={json.dumps([pairs, {**bad_pairs, 'weight': 0.01}])}", "train.checkpoint_every=2")


def test_nan_stops_the_run_before_it_is_saved(folder: Path, diverging: tuple[str, ...]) -> None:
    line = (
        r"^step (\d+): not finite \(loss nan, gradient norm nan; batch from pairs, bad\)\. "
        r"The last good checkpoint is of step (\d+)\. Check the data, set train\.on_nan=skip and run the same command, or "
        r"lower optim\.learning_rate in a new run\.dir \(model\.base=.* starts it from this run\)\.$"
    )
    with pytest.raises(UserError, match=line) as error:
        train(make_config(folder, "nan", *diverging))
    step = int(str(error.value).split()[1].rstrip(":"))
    assert step - 2 <= list_checkpoints(folder / "nan")[-1] < step
    assert all(loss is not None for loss in read_losses(folder / "nan"))


def test_nan_steps_can_be_skipped(folder: Path, diverging: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    train(make_config(folder, "skip", *diverging, "train.on_nan=skip"))
    rows = {row["step"]: row for row in read_metrics(folder / "skip") if "loss" in row}
    skipped = [step for step, row in rows.items() if row["loss"] is None]
    assert 0 < len(skipped) < 6
    assert len(rows) == 12
    assert capfd.readouterr().err.count("batch from pairs, bad). Skipped the update.") == len(skipped)
    for step in set(skipped) - {12}:
        assert rows[step]["learning_rate"] == rows[step + 1]["learning_rate"]  # the optimizer did not move


def test_a_step_that_hangs_ends_the_process_with_its_stacks(folder: Path) -> None:
    hang = (
        "import time\nfrom jaxembed.data import batch\nfrom jaxembed.training import loop\n"
        "real, limit = batch.BatchBuilder.__call__, loop.must_finish\n"
        "def build(self, step, ids):\n    if step == 9: time.sleep(1000)\n    return real(self, step, ids)\n"
        "batch.BatchBuilder.__call__ = build\n"
        "loop.must_finish = lambda name, s: limit(name, s if name == 'step 10' else 300)"  # others may compile for long
    )
    process = start_training(folder, "hang", "train.stall_timeout_s=3", setup_code=hang)
    stderr = process.communicate()[1]
    assert process.returncode == 1
    assert "error: step 10 did not finish in 3 s (train.stall_timeout_s). Stacks of all threads:" in stderr
    assert "in fit" in stderr
    assert "in build" in stderr


def test_another_base_is_refused_and_other_versions_are_reported(folder: Path, monkeypatch, caplog) -> None:
    config = make_config(folder, "mine", "train.steps=1")
    train(config)
    monkeypatch.setattr(run_dir, "collect_package_versions", lambda: {"python": "3.99"})
    with caplog.at_level("WARNING"):
        train(config)
    assert "python: '3.11" in caplog.text
    weights = folder / "base" / "model.safetensors"
    before = weights.read_bytes()
    flip_byte(weights)
    try:
        with pytest.raises(UserError, match=r"mine: its base changed \(hash: .* -> .*\)\. Restore it"):
            train(config)
    finally:
        weights.write_bytes(before)


def test_a_checkpoint_of_another_plan_is_refused(folder: Path) -> None:
    pairs = folder / "swapped.jsonl"
    pairs.write_text((folder / "pairs.jsonl").read_text())
    config = make_config(folder, "swapped", "train.steps=1", f"data.sources.0.path={pairs}")
    train(config)
    pairs.write_text("".join(reversed(pairs.read_text().splitlines(keepends=True))))
    (folder / "swapped" / "data_hashes.json").unlink()
    with pytest.raises(UserError, match="swapped: the training data changed since step 1"):
        train(config)


DAMAGED_CONTENTS = {
    "config.yaml": ["run: [", "[]", "\udcff", ""],
    "base.json": ["{", "[]", "\udcff", '{"name": 3, "config": {}}', '{"name": "a", "config": []}'],
    "data_hashes.json": ["{", "[]", '{"a": 1}'],
    "jaxembed.json": ["{", "[]", '{"pooling": "median"}', '{"max_length": "9"}', '{"prompts": {"query": 1}}', '{"new": 1}'],
    "metrics.jsonl": ["{\n", "[]\n", '{"step": "x"}\n', '{"step": 1, "loss": {}}\n', "\udcff\n"],
    "digests.json": ["{", "[]", '{"1": 2}', '{"1": {"a": 2}}'],
}


@pytest.mark.parametrize("name", DAMAGED_CONTENTS)
def test_a_damaged_file_of_a_run_is_named_and_stays_as_it_is(folder: Path, name: str) -> None:
    run = folder / "damaged-files"
    config = make_config(folder, run.name, "train.steps=1", "eval.untrained=false")
    if not run.exists():
        train(config)
    readers = {
        "config.yaml": [lambda: train(config)],
        "data_hashes.json": [lambda: train(config)],
        "base.json": [lambda: train(config), lambda: Embedder.load(run)],
        "jaxembed.json": [lambda: train(config), lambda: Embedder.load(run)],
        "metrics.jsonl": [lambda: train(config), lambda: read_card(run, "damaged-files-1")],
        "digests.json": [lambda: train(config), lambda: Embedder.load(run)],
    }[name]
    intact = (run / name).read_bytes()
    for content in DAMAGED_CONTENTS[name]:
        damaged = content.encode(errors="surrogateescape")
        (run / name).write_bytes(damaged)
        for call in readers:
            with pytest.raises(UserError, match=rf"^{run}(/{name}|: its)") as error:
                call()
            assert len(str(error.value).splitlines()) == 1
            assert (run / name).read_bytes() == damaged
    (run / name).write_bytes(intact)
    train(config)
    assert list_checkpoints(run) == [1]
    assert len(read_losses(run)) == 1
