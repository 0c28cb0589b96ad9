"""Finished runs of a benchmark in a file, so that a later command does not repeat them."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonl_rows import read_rows

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class FinishedRuns:
    """Trains and scores what a file of finished runs lacks. Every run is one line of JSON.

    Attributes:
        path: The file.
        settings: The settings that all runs share. Runs with others are ignored. Paths are compared as texts.
    """

    path: Path
    settings: Mapping[str, Any]

    @functools.cached_property
    def _stored_settings(self) -> dict[str, Any]:
        """The settings as the file has them."""
        stored: dict[str, Any] = json.loads(json.dumps(self.settings, default=str))
        return stored

    def read(self, **key: Any) -> list[dict[str, Any]]:
        """Return the finished runs with these values, in the order of the file."""
        rows = read_rows(self.path) if self.path.exists() else []
        return [
            row
            for row in rows
            if row["settings"] == self._stored_settings and all(row[name] == value for name, value in key.items())
        ]

    def run_missing(self, measure: Callable[[Path], Scores], **key: Any) -> None:
        """Measure a run in a temporary folder and append it to the file, unless it is there.

        Args:
            measure: Trains in the run directory that it is given, which does not exist, and returns the scores.
            **key: Values that identify the run among those with the same settings.
        """
        if self.read(**key):
            return
        start, folder = time.perf_counter(), Path(tempfile.mkdtemp())
        try:
            scores = measure(folder / "run")
        finally:
            shutil.rmtree(folder)
        line = {**key, "scores": scores, "minutes": round((time.perf_counter() - start) / 60, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"settings": self._stored_settings}) + "\n")
        print(json.dumps(line), file=sys.stderr, flush=True)
