"""The metrics of a run: metrics.jsonl, the loggers of `train.loggers`, and the progress bar on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from jaxembed.config.fields import Fields
from jaxembed.data.schema import parse_row
from jaxembed.devices.standard_streams import LossyStream
from jaxembed.errors import UserError
from jaxembed.files import exists, finite_or_none, read_bytes, write_text


class MetricLogger(Protocol):
    """Receives the metrics of a run."""

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        ...

    def close(self) -> None:
        """Flush and close the logger."""
        ...


class Recorder:
    """Writes the metrics of a run and shows its progress. A step may have several JSON objects: metrics, scores, warnings."""

    def __init__(self, run_dir: Path, start: int, steps: int, loggers: Sequence[MetricLogger] = ()):
        """Open the metrics of a run.

        Args:
            run_dir: The run directory.
            start: Last step of the checkpoint that the run resumes from, 0 for a new run. Rows after it are dropped.
            steps: Number of steps of the whole run.
            loggers: Further receivers of the metrics. The recorder closes them.
        """
        path = run_dir / "metrics.jsonl"
        rows = [row for row in read_metrics(run_dir) if row["step"] <= start] if start else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")
        self._loggers = loggers
        self._stderr = LossyStream(sys.stderr)
        self._bar = tqdm(total=steps, initial=start, unit="step", file=self._stderr, dynamic_ncols=True)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def show(self, **values: str) -> None:
        """Show values next to the progress bar."""
        self._bar.set_postfix(values)

    def log(self, step: int, values: Mapping[str, float], stage: int = 0) -> None:
        """Write the values of a step. A value that is not finite becomes null in JSON. Raises `OSError` if that fails."""
        finite = {name: finite_or_none(value) for name, value in values.items()}
        self._file.write(json.dumps({"stage": stage, "step": step, **finite}) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.write_scalars(step, values)

    def say(self, text: str) -> None:
        """Print a line on standard error, above the progress bar."""
        self._bar.write(text, file=self._stderr)

    def close(self) -> None:
        """Close all files and the progress bar. All rows are already written, so a full disk is not an error here."""
        self._bar.close()
        for close in (self._file.close, *(logger.close for logger in self._loggers)):
            with contextlib.suppress(OSError):
                close()


class NullRecorder:
    """Records nothing. Every process but the first uses it instead of a `Recorder`."""

    def advance(self) -> None:
        """Do nothing."""

    def show(self, **values: str) -> None:
        """Do nothing."""

    def log(self, step: int, values: Mapping[str, float], stage: int = 0) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read every logged row of a run, in order. A last line that a kill cut short is left out.

    Raises:
        UserError: A line is damaged. The message names it.
    """
    path = run_dir / "metrics.jsonl"
    if not exists(path):
        return []
    content = read_bytes(path)
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_parse_metrics(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse_metrics(line: bytes, where: str) -> dict[str, Any]:
    advice = "This file of the run is damaged: restore it, or remove the line."
    try:
        row = parse_row(line, where)
        Fields(row, where).integer("step", minimum=0)
    except UserError as error:
        raise UserError(f"{str(error).removesuffix('.')}. {advice}") from None
    for key, value in row.items():
        if not isinstance(value, int | float | None):
            raise UserError(f"{where}: {key} is not a number. {advice}")
    return row
