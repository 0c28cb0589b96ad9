"""Which checkpoint is the best: scores that are no numbers have no rank."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxembed.errors import Stopped
from jaxembed.formats.checkpoints import CheckpointReader, pick_step
from jaxembed.training.loop import TrainingLoop


def make_checkpoints(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float | None]) -> CheckpointReader:
    """Return checkpoints with these scores by step."""
    checkpoints = CheckpointReader.__new__(CheckpointReader)
    monkeypatch.setattr(CheckpointReader, "list_steps", lambda self: list(scores))
    monkeypatch.setattr(CheckpointReader, "read_cursor", lambda self, step: {"score": scores[step]})
    return checkpoints


@pytest.mark.parametrize(
    ("scores", "best", "message"),
    [
        ({1: 0.2, 2: 0.7, 3: None, 4: float("nan")}, 2, None),
        ({1: float("nan"), 2: 0.1}, 2, None),
        ({1: None, 2: None}, 2, "run: no checkpoint was scored, so best is the last one, of step 2"),
    ],
)
def test_the_best_checkpoint_has_the_highest_score(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scores: Any, best: int, message: str | None
) -> None:
    caplog.set_level(logging.INFO, "jaxembed")
    assert pick_step(make_checkpoints(monkeypatch, scores), "best", Path("run")) == best
    assert caplog.messages == ([] if message is None else [message])


def test_a_score_that_is_not_finite_is_reported_and_not_saved() -> None:
    lines: list[str] = []
    loop: Any = SimpleNamespace(best_metric="sts/spearman", recorder=SimpleNamespace(say=lines.append))
    assert TrainingLoop._get_ranking_score(loop, 0.5, 3) == 0.5 and not lines
    assert TrainingLoop._get_ranking_score(loop, float("nan"), 4) is None
    assert lines == ["step 4: sts/spearman is not finite, so this checkpoint is not ranked"]


@pytest.mark.parametrize("total_steps", [3, 4])
def test_a_stop_signal_does_not_skip_an_evaluation_that_is_due(monkeypatch: pytest.MonkeyPatch, total_steps: int) -> None:
    """A resumed run would start with the next step. At the last step of the run, the signal is ignored."""
    saved_scores: list[float | None] = []
    checkpoints = SimpleNamespace(save=lambda state, cursor, score: saved_scores.append(score))
    recorder = SimpleNamespace(advance=lambda: None, log=lambda *args: None, say=lambda line: None)
    profile = SimpleNamespace(before_step=lambda step: None, after_step=lambda step, metrics: None)
    train = SimpleNamespace(stall_timeout_s=60, log_every=100, eval_every=100, checkpoint_every=100)
    monkeypatch.setattr(TrainingLoop, "_log", lambda self, step, metrics, stats: None)
    monkeypatch.setattr(TrainingLoop, "_start_step", lambda self, state, batch, stats: (state, {"loss": 1.0, "grad_norm": 1.0}))
    monkeypatch.setattr("jaxembed.training.loop.StepStats", lambda: SimpleNamespace(add=lambda *args: None, start_time=0.0))
    fields = {"mesh": None, "train_step": None, "mfu_meter": None, "profile": profile, "recorder": recorder}
    loop: Any = TrainingLoop(
        stage=SimpleNamespace(last_step=3, index=0, plan_hash="", config=SimpleNamespace(train=train)),
        total_steps=total_steps,
        evaluate=lambda weights: {"sts/spearman": 0.5},
        best_metric="sts/spearman",
        checkpoints=checkpoints,
        check_scores=lambda step, scores: None,
        **fields,
    )
    stop: Any = SimpleNamespace(is_due=lambda step: True, signal=15)
    state: Any = SimpleNamespace(step=2, weights=None)
    with nullcontext() if total_steps == 3 else pytest.raises(Stopped, match="after step 3 of 4"):
        loop.fit(state, iter([SimpleNamespace()]), stop)
    assert saved_scores == [0.5]
