"""Changes that a step makes to each row after it has seen all rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, StepOutcome, encode_row
from jaxembed.data.schema import Row


class RowChange(NamedTuple):
    """The change of one row.

    Attributes:
        fields: New values of some fields; empty for none. None drops the row.
        reasons: Reasons of the change, as the report counts them.
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
            file.write(encode_row({"fields": fields, "reasons": reasons}) + "\n")


def make_change_filter(path: Path) -> RowStep:
    """Return the function that applies the changes in a file. Rows must come in the order in which they were collected."""
    lines = iter_lines(path)

    def apply(curated: CuratedRow) -> StepOutcome:
        fields, reasons = json.loads(next(lines)).values()
        return StepOutcome(None if fields is None else {**curated.fields, **fields}, tuple(reasons))

    return lambda rows: [apply(row) for row in rows]


def iter_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, and close it after the last one."""
    with path.open(encoding="utf-8") as file:
        yield from file
