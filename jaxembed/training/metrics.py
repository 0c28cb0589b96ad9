"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the progress bar on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxembed.config.fields import Fields
from jaxembed.data.schema import parse_row
from jaxembed.errors import UserError
from jaxembed.files import exists, read_bytes, write_text


class Recorder:
    """Appends one JSON object a logged step, and shows progress. Lines past `start` (a resumed run's) are dropped first."""

    def __init__(self, run_dir: Path, start: int, steps: int):
        path = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(run_dir) if row["step"] <= start] if start else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start or None)
        self._bar = tqdm(total=steps, initial=start, unit="step", file=sys.stderr, dynamic_ncols=True)

    def advance(self) -> None:
        """One step done."""
        self._bar.update()

    def show(self, **values: str) -> None:
        """Values that stand beside the bar."""
        self._bar.set_postfix(values)

    def log(self, step: int, values: Mapping[str, float], stage: int = 0) -> None:
        """Writes the numbers of a step; what is not finite becomes null in JSON."""
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"stage": stage, "step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line on standard error that does not disturb the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._events.close()


class Unrecorded:
    """What the other processes of a run have in place of the first one's `Recorder`."""

    def advance(self) -> None: ...
    def show(self, **values: str) -> None: ...
    def log(self, step: int, values: Mapping[str, float], stage: int = 0) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every logged object of a run, in order; a last line cut short by a kill is left out.

    `UserError` names the line that is not as it was written.
    """
    path = run_dir / "metrics.jsonl"
    if not exists(path):
        return []
    content = read_bytes(path)
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_row(line, where)
        Fields(row, where).whole("step", least=0)
    except UserError as error:
        raise UserError(f"{error}; this file of the run is damaged: restore it, or remove the line") from None
    wrong = [key for key, value in row.items() if not isinstance(value, int | float | None)]
    if wrong:
        raise UserError(f"{where}: {wrong[0]} is no number; this file of the run is damaged: restore it, or remove the line")
    return row
