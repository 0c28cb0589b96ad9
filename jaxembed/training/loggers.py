"""Loggers that receive the metrics of a run besides metrics.jsonl: TensorBoard, Weights & Biases, trackio (`train.loggers`).

Weights & Biases and trackio are optional packages, which read their own settings from the environment
(WANDB_PROJECT, WANDB_MODE, TRACKIO_DIR, ...). API keys come from there too, and are never logged.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from jaxembed.config import Config
from jaxembed.config.fields import Fields
from jaxembed.errors import UserError, summarize
from jaxembed.files import exists, read_json, write_json
from jaxembed.formats.run_files import LOGGERS_FILE, read_run_file
from jaxembed.training.metrics import MetricLogger, read_metrics
from jaxembed.training.tensorboard import EventFile

log = logging.getLogger("jaxembed")

PROJECT = "jaxembed"  # default project; WANDB_PROJECT overrides it for Weights & Biases
ID_CHARS = 8
TrackingFunctions = tuple[Callable[..., object], Callable[[], object]]  # log the values of a step; finish the run


class PackageLogger:
    """Passes metrics to a tracking package. A failure never stops training: after the first one, nothing more is logged."""

    def __init__(self, name: str, package: TrackingFunctions, logged: Collection[tuple[int, frozenset[str]]] = ()):
        """Wrap an open run.

        Args:
            name: Name of the package, for warnings.
            package: The functions that log the values of a step and finish the run.
            logged: Steps and metric names that an earlier start has logged. They are not logged again.
        """
        self._name, self._logged = name, logged
        self._log, self._finish = package
        self._has_failed = False

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        if (step, frozenset(values)) not in self._logged:
            self._try(lambda: self._log(dict(values), step=step))

    def close(self) -> None:
        """Finish the run of the package."""
        self._try(self._finish)

    def _try(self, function: Callable[[], object]) -> None:
        if self._has_failed:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
                function()
        except Exception as error:  # a network or a server can fail in any way
            self._has_failed = True
            log.warning("%s: writes no more metrics (%s). metrics.jsonl has all of them.", self._name, summarize(error))


def check_loggers_installed(names: Sequence[str]) -> None:
    """Raise `UserError` if the package of a logger is not installed."""
    for name in names:
        if name in OPENERS and importlib.util.find_spec(name) is None:
            raise UserError(f"train.loggers: {name} is not installed. Run pip install '.[{name}]'.")


def open_loggers(config: Config, start: int) -> list[MetricLogger]:
    """Open the loggers of a run.

    Args:
        config: The config of the run. Its directory exists.
        start: Last step of the checkpoint that the run resumes from, 0 for a new run.

    Raises:
        UserError: A logger is not installed, or cannot be opened.
    """
    check_loggers_installed(config.train.loggers)
    return [_open_logger(name, config, start) for name in config.train.loggers]


def _open_logger(name: str, config: Config, start: int) -> MetricLogger:
    run_dir = Path(config.run.dir)
    if name == "tensorboard":
        return EventFile(run_dir / "tensorboard", purge_step=start or None)
    run_id = _find_run_id(run_dir, name)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
            package = OPENERS[name](config, run_id)
    except Exception as error:  # no key, no network, a full disk
        raise UserError(
            f"train.loggers: {name} cannot be opened ({summarize(error)}). {LOGGER_ADVICE[name]}, or remove it from "
            "train.loggers."
        ) from None
    return PackageLogger(name, package, _find_logged_values(run_dir, start))


def _find_logged_values(run_dir: Path, start: int) -> set[tuple[int, frozenset[str]]]:
    """Return step and metric names of the rows of metrics.jsonl that a run which resumes at `start` computes again."""
    rows = [row for row in read_metrics(run_dir) if row["step"] > start or not start]
    return {(row["step"], frozenset(row) - {"stage", "step"}) for row in rows}


def _find_run_id(run_dir: Path, name: str) -> str:
    """Return the id under which a logger knows a run. It is stored at the first start, so that a resumed run continues it."""
    path = run_dir / LOGGERS_FILE
    ids = read_run_file(read_json, path) if exists(path) else {}
    if name not in ids:
        ids = {**ids, name: uuid.uuid4().hex[:ID_CHARS]}
        write_json(path, ids)
    return Fields(ids, str(path)).string(name)


def _open_wandb(config: Config, run_id: str) -> TrackingFunctions:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=config.run.name,
        id=run_id,
        resume="allow",
        dir=config.run.dir,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
    )
    return run.log, run.finish


def _open_trackio(config: Config, run_id: str) -> TrackingFunctions:
    import trackio

    run = trackio.init(
        project=PROJECT,
        name=f"{config.run.name}-{run_id}",
        resume="allow",
        config=config.model_dump(mode="json"),
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return run.log, trackio.finish  # not run.finish, after which trackio would finish the run again at exit


OPENERS: dict[str, Callable[[Config, str], TrackingFunctions]] = {"wandb": _open_wandb, "trackio": _open_trackio}
LOGGER_ADVICE = {
    "wandb": "Set WANDB_API_KEY, set WANDB_MODE=offline to write to the run directory",
    "trackio": "Set TRACKIO_DIR to a folder that can be written",
}
