"""Loggers besides metrics.jsonl: what they write offline, how a resumed run continues, and what stops them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.commands import ENV, Process
from jaxembed.config import Config, load_config
from jaxembed.errors import UserError
from jaxembed.training.loggers import PackageLogger, check_loggers_installed, open_loggers
from jaxembed.training.tensorboard import EventFile

KEY = "0123456789abcdef" * 2 + "01234567"
# A run that logs steps 1 to 3, and is resumed from the checkpoint of step 2 to log steps 3 to 5.
RESUMED_RUN = """
import json, sys
from pathlib import Path
from jaxembed.config import load_config
from jaxembed.training.loggers import open_loggers
from jaxembed.training.metrics import Recorder
config = load_config(sys.argv[1], sys.argv[2:])
for start in (0, 2):
    recorder = Recorder(Path(config.run.dir), start, 5, open_loggers(config, start))
    for step in range(start + 1, start + 4):
        recorder.log(step, {"loss": 1 / step})
    recorder.close()
"""
READ_TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage
runs = {run: SQLiteStorage.get_logs("jaxembed", run) for run in SQLiteStorage.get_runs("jaxembed")}
print(json.dumps({run: [(row["step"], row["loss"]) for row in rows] for run, rows in runs.items()}))
"""


def write_config(folder: Path) -> Path:
    path = folder / "logged.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": "base"}, "data": {"sources": [{"path": "pairs.jsonl"}]}}))
    return path


def load(folder: Path, *overrides: str) -> Config:
    (folder / "run").mkdir(exist_ok=True)
    return load_config(write_config(folder), [f"run.dir={folder / 'run'}", *overrides])


def run_logged(folder: Path, logger: str, code: str = "", env: Mapping[str, str] = ENV) -> str:
    """Run `RESUMED_RUN` with a logger, and return what it prints."""
    (folder / "run").mkdir()
    arguments = [str(write_config(folder)), f"run.dir={folder / 'run'}", f"train.loggers=[{logger}]"]
    process = Process(RESUMED_RUN + code, arguments, {**env, "HOME": str(folder)})
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def test_tensorboard_is_the_default_and_can_be_switched_off(tmp_path: Path) -> None:
    (logger,) = open_loggers(load(tmp_path), 0)
    assert isinstance(logger, EventFile)
    logger.close()
    assert open_loggers(load(tmp_path, "train.loggers=[]"), 0) == []


def test_wandb_writes_offline_and_a_resumed_run_continues_the_same_run(tmp_path: Path) -> None:
    out = run_logged(tmp_path, "wandb", env={**ENV, "WANDB_MODE": "offline", "WANDB_API_KEY": KEY})
    assert out == ""
    logger_id = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{logger_id}.wandb"] * len(files) and files
    assert any(b"loss" in path.read_bytes() for path in files)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_trackio_has_every_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    out = run_logged(tmp_path, "trackio", READ_TRACKIO, {**ENV, "TRACKIO_DIR": str(tmp_path / "trackio")})
    ((name, rows),) = json.loads(out).items()
    assert name == f"logged-{json.loads((tmp_path / 'run' / 'loggers.json').read_text())['trackio']}"
    assert rows == [[step, 1 / step] for step in range(1, 6)]


def test_wandb_without_a_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    with pytest.raises(UserError, match=r"^train\.loggers: wandb cannot be opened \(No API key .*\)\. Set WANDB_API_KEY, "):
        open_loggers(load(tmp_path, "train.loggers=[wandb]"), 0)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_loggers_installed(["tensorboard"])
    with pytest.raises(UserError, match=rf"^train\.loggers: {name} is not installed\. Run pip install '.\[{name}\]'\.$"):
        check_loggers_installed(["tensorboard", name])


@pytest.mark.parametrize(("name", "hint"), [("wand", r"\. Did you mean wandb\?"), ("csv", r"\.")])
def test_an_unknown_logger_is_one_line_with_the_nearest_name(tmp_path: Path, name: str, hint: str) -> None:
    message = rf"train\.loggers\.1 is '{name}' \(expected 'tensorboard', 'wandb' or 'trackio'\){hint}$"
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"train.loggers=[tensorboard, {name}]")


class FailingRun:
    """A run of a package whose server is gone after the first step."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))
        if step > 1:
            raise ConnectionError("gone")

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_failing_logger_warns_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    run = FailingRun()
    logger = PackageLogger("wandb", (run.log, run.finish))
    for step in (1, 2, 3):
        logger.write_scalars(step, {"loss": 1.0})
    logger.close()
    assert run.calls == [(1, {"loss": 1.0}), (2, {"loss": 1.0})]
    assert caplog.messages == ["wandb: writes no more metrics (gone). metrics.jsonl has all of them."]
