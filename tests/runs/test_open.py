"""What opening a run checks before any data is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxembed.config import Config, load_config
from jaxembed.errors import UserError
from jaxembed.runs.open import _warn_of_long_warmup, open_run
from jaxembed.training.run_lock import RunLock


def load(folder: Path, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": "preset:tiny"}, "data": {"sources": [{"path": "absent.jsonl"}]}}))
    return load_config(path, [f"run.dir={folder / 'run'}", *overrides])


def test_bm25_without_its_library_is_reported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    mesh: Any = None
    with pytest.raises(UserError, match=r"^BM25: bm25s is not installed\. Run pip install '\.\[eval\]'\.$"):
        open_run(load(tmp_path, "eval.bm25=true"), mesh, RunLock(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_warm_up_beyond_the_schedule_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_long_warmup(load(tmp_path, "train.steps=10", "optim.warmup_steps=10"), 0)
    assert not caplog.text
    _warn_of_long_warmup(load(tmp_path, "train.steps=10", "optim.warmup_steps=11"), 0)
    assert "optim.warmup_steps is 11, more than the 10 steps of the schedule" in caplog.text
    caplog.clear()
    stages = "stages=[{train: {steps: 6}}, {train: {steps: 6}, optim: {restart: false}}]"
    _warn_of_long_warmup(load(tmp_path, stages, "optim.warmup_steps=12"), 0)
    assert not caplog.text, "the stages share a schedule of 12 steps"
    _warn_of_long_warmup(load(tmp_path, stages, "optim.warmup_steps=13"), 1)
    assert "stages.1.optim.warmup_steps is 13" in caplog.text
