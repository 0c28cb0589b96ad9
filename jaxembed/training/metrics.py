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

from jaxembed.files import write_text


class Recorder:
    """Appends one JSON object a logged step, and shows progress. Lines past `start` (a resumed run's) are dropped first."""

    def __init__(self, run_dir: Path, start: int, steps: int):
        path = run_dir / "metrics.jsonl"
        kept = [line for line in _lines(path) if start and json.loads(line)["step"] <= start]
        write_text(path, "".join(line + "\n" for line in kept))
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


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; one cut short by a kill is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every logged object of a run, in order."""
    return [json.loads(line) for line in _lines(run_dir / "metrics.jsonl")]
