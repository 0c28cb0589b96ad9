"""The warning of a run whose model becomes worse than its base."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.runs import make_config, train_until_stopped, use_one_device, write_base_and_data
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.runs.base_monitor import BaseMonitor
from jaxembed.runs.train import train
from jaxembed.training.metrics import Recorder, read_metrics


class Lines:
    """A recorder that keeps the rows it gets."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def log(self, step: int, values: dict[str, float], stage: int = 0) -> None:
        self.logged.append((step, values))


def open_monitor(
    run_dir: Path, rows: list[dict[str, Any]], adapters: tuple[str, ...] = (), **base: Any
) -> tuple[BaseMonitor, Lines]:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"step": 0, **row}) + "\n" for row in rows))
    found = {"name": "base", "has_weights": True, "spec": EmbeddingSpec(pooling="mean"), **base}
    run: Any = SimpleNamespace(
        run_dir=run_dir,
        spec=EmbeddingSpec(pooling="mean"),
        base=SimpleNamespace(**found),
        model=SimpleNamespace(adapters=adapters),
    )
    lines: Any = Lines()
    return BaseMonitor(run, lines), lines


BASE_ROWS = [{"untrained/a/accuracy": 0.8, "untrained/a/f1": 0.7, "untrained/b/spearman": 0.5},
             {"noise/a/accuracy": 0.02, "noise/b/spearman": 0.1}]  # fmt: skip


def test_a_drop_beyond_the_noise_is_reported_once_per_set(tmp_path: Path) -> None:
    monitor, lines = open_monitor(tmp_path, BASE_ROWS)
    monitor.check(10, {"a/accuracy": 0.79, "a/f1": 0.1, "b/spearman": 0.41, "c/spearman": 0.0})
    assert not lines.said, "within the noise, not a main score, or not scored before training"
    monitor.check(20, {"a/accuracy": 0.7, "b/spearman": float("nan")})
    monitor.check(30, {"a/accuracy": 0.6, "b/spearman": 0.39})
    assert lines.said[0] == (
        "warning: step 20: a/accuracy is 0.7000, and the base's is 0.8000. The drop of 0.1000 is more than the noise of the "
        "set (standard error 0.0200). Lower optim.learning_rate, train fewer steps, or add general data. The mean of both "
        f"models often keeps what the base knew: python -m jaxembed.merge MERGED {tmp_path} base"
    )
    assert len(lines.said) == 2 and "b/spearman is 0.3900" in lines.said[1]
    assert [step for step, _ in lines.logged] == [20, 30]


def test_merging_is_suggested_only_if_it_is_possible(tmp_path: Path) -> None:
    mean = EmbeddingSpec(pooling="mean")
    impossible: list[dict[str, Any]] = [
        {"spec": EmbeddingSpec(pooling="last")},
        {"spec": mean.replace(append_eos=not mean.append_eos)},
        {"adapters": ("a", "b")},
    ]
    for case in impossible:
        monitor, lines = open_monitor(tmp_path, BASE_ROWS, **case)
        monitor.check(10, {"a/accuracy": 0.0})
        assert "jaxembed.merge" not in lines.said[0] and "Lower optim.learning_rate" in lines.said[0]
    monitor, lines = open_monitor(tmp_path, BASE_ROWS, name="my base")
    monitor.check(10, {"b/spearman": 0.0, "a/accuracy": 0.0})
    assert "jaxembed.merge" in lines.said[0] and lines.said[0].endswith("'my base'")
    assert ["a/accuracy" in line for line in lines.said] == [True, False], "sorted"
    monitor, lines = open_monitor(tmp_path, BASE_ROWS, has_weights=False)
    monitor.check(10, {"a/accuracy": 0.0})
    assert not lines.said, "a random model is no base to keep"


def test_a_resumed_run_warns_and_repeats_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_device(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(Recorder, "say", lambda recorder, text: said.append(text))
    folder = write_base_and_data(tmp_path)
    sets = [{"name": name, "kind": "sts", "path": str(folder / "sts.jsonl"), "instruction": "Find it"} for name in ("x", "y")]
    # The second set is new when the run resumes: it has no score of the base.
    options = ("train.steps=4", "train.eval_every=2", "optim.learning_rate=0.3", "optim.warmup_steps=0")
    train_until_stopped(make_config(folder, "run", *options, f"eval.sets={json.dumps(sets[:1])}"), 3)
    assert [row["step"] for row in read_metrics(folder / "run") if "noise/x/spearman" in row] == [0]
    before = [line for line in said if line.startswith("warning: step")]
    train(make_config(folder, "run", *options, f"eval.sets={json.dumps(sets)}"))
    warnings = [line for line in said if line.startswith("warning: step")]
    scores = {row["step"]: row["eval/x/spearman"] for row in read_metrics(folder / "run") if "eval/x/spearman" in row}
    [base] = [row["untrained/x/spearman"] for row in read_metrics(folder / "run") if "untrained/x/spearman" in row]
    [noise] = [row["noise/x/spearman"] for row in read_metrics(folder / "run") if "noise/x/spearman" in row]
    dropped = [step for step, score in scores.items() if base - score > noise]
    assert dropped, f"this learning rate ruins the model: {base}, {noise}, {scores}"
    assert len(warnings) == 1 and f"warning: step {dropped[0]}: x/spearman" in warnings[0]
    assert len(before) == (dropped[0] == 2)
