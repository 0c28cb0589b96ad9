"""Run steps of `jaxembed curate` on rows with known defects, and format the rows of the table that compares them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonl_rows import read_rows

from jaxembed.config.curation import CurateConfig
from jaxembed.curate import make_context
from jaxembed.curation.engine import curate
from jaxembed.data.jsonl import write_jsonl

Rows = list[dict[str, Any]]
TABLE_HEADER = "| step | target | injected | found | precision | recall |\n|---|---|---|---|---|---|"


class StepScore(NamedTuple):
    """How well a step finds the defects that were injected.

    Attributes:
        step: The step with its settings.
        target: Kind of the defects.
        expected: Number of injected defects.
        found: Number of rows that the step changes or drops.
        hits: Number of defects among the found rows.
    """

    step: str
    target: str
    expected: int
    found: int
    hits: int

    def format_row(self) -> str:
        """Return the row of the table."""
        precision, recall = self.hits / max(self.found, 1), self.hits / max(self.expected, 1)
        return f"| {self.step} | {self.target} | {self.expected:,} | {self.found:,} | {precision:.3f} | {recall:.3f} |"


def score_step(step: str, target: str, found: Iterable[str], expected: Iterable[str]) -> StepScore:
    """Score a step by the ids of the rows that it finds and of those that it should find."""
    found_ids, expected_ids = set(found), set(expected)
    return StepScore(step, target, len(expected_ids), len(found_ids), len(found_ids & expected_ids))


def run_steps(rows: Rows, steps: Sequence[Mapping[str, Any]], folder: Path, cache: Path) -> dict[str, dict[str, Any]]:
    """Curate rows that have an `id`.

    Args:
        rows: The rows.
        steps: The steps, as in a config of `jaxembed curate`.
        folder: Existing folder for the files. Several runs may share it.
        cache: Cache of vectors and scores.

    Returns:
        The rows that the steps keep, by id.
    """
    run = sum(1 for _ in folder.glob("rows*.jsonl"))
    path, out = folder / f"rows{run}.jsonl", folder / f"out{run}"
    write_jsonl(path, rows)
    tree = {"out": str(out), "metadata": ["id"], "sources": [{"path": str(path), "name": "rows"}], "steps": list(steps)}
    curate(CurateConfig.model_validate(tree), make_context(cache), "benchmark")
    return {row["id"]: row for row in read_rows(out / "rows.jsonl")}
