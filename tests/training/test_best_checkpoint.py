"""Which checkpoint is the best: scores that are no numbers have no rank."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
