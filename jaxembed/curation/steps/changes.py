"""Changes of rows: what a step that has seen all rows changes in each of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, StepOutcome, write_row
from jaxembed.data.schema import Row


class RowChange(NamedTuple):
    """What a step changes in a row.

    Attributes:
        fields: New values of some fields; empty for none. None drops the row.
        reasons: Why, as the report counts it.
    """

    fields: Row | None
    reasons: tuple[str, ...] = ()


UNCHANGED = RowChange({})


class ChangingStep(Protocol):
    """A step that changes rows after it has seen all of them."""

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record rows."""

    def iter_changes(self) -> Iterator[RowChange]:
        """Yield the change of each row, in the order in which rows were collected."""

    def close(self) -> None:
        """Close the files of the step."""


def write_changes(path: Path, changes: Iterable[RowChange]) -> None:
    """Write changes to a file, one per line."""
    with path.open("w", encoding="utf-8") as file:
        for fields, reasons in changes:
            file.write(write_row({"fields": fields, "reasons": reasons}) + "\n")


def make_change_filter(path: Path) -> RowStep:
    """Return the function that applies the changes in a file. Rows must come in the order in which they were collected."""
    lines = iter_lines(path)

    def apply(curated: CuratedRow) -> StepOutcome:
        fields, reasons = json.loads(next(lines)).values()
        return StepOutcome(None if fields is None else {**curated.fields, **fields}, tuple(reasons))

    return lambda rows: [apply(row) for row in rows]


def iter_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, which is open meanwhile."""
    with path.open(encoding="utf-8") as file:
        yield from file
