"""The step `curriculum`: rows are divided into levels by their difficulty (Bengio et al. 2009)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxembed.config.curation import CurriculumStepConfig
from jaxembed.curation.steps.changes import RowChange
from jaxembed.curation.steps.curated_row import CuratedRow, hash_row
from jaxembed.data.schema import Row, list_fields
from jaxembed.errors import UserError

ROW_RECORD = np.dtype([("difficulty", "<f8"), ("row_hash", "<u8")])


class CurriculumStep:
    """Sorts rows by difficulty, and divides them into levels of equal size. Rows without a difficulty come first.

    Equal difficulties are sorted by a hash of the row, so levels do not depend on the order of the rows.
    """

    def __init__(self, config: CurriculumStepConfig):
        """Start without rows."""
        self._config = config
        self._parts: list[np.ndarray] = []
        self._fields = ""

    def close(self) -> None:
        """Do nothing: the step has no open files."""

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the difficulties of rows."""
        records = [(find_difficulty(row.fields, self._config.by), hash_row(row.fields)) for row in rows]
        self._parts.append(np.array(records, ROW_RECORD))
        self._fields = self._fields or next((list_fields(row.fields) for row in rows), "")

    def iter_changes(self) -> Iterator[RowChange]:
        """Yield the level of each row. Raise `UserError` if no row has a difficulty. See `changes.ChangingStep`."""
        records = np.concatenate([np.zeros(0, ROW_RECORD), *self._parts])
        is_known = ~np.isnan(records["difficulty"])
        if len(records) and not is_known.any():
            raise UserError(
                f"curriculum by {self._config.by}: no row has a number in this field (the first row has {self._fields}). "
                "Name another field, or write scores with a step mine or judge before it."
            )
        sign = -1 if self._config.descending else 1
        order = np.lexsort((records["row_hash"], sign * np.nan_to_num(records["difficulty"]), is_known))
        levels = np.empty(len(records), np.int64)
        levels[order] = 1 + np.arange(len(records)) * self._config.levels // max(len(records), 1)
        for level in levels.tolist():
            yield RowChange({self._config.field: level})


def find_difficulty(row: Row, field: str) -> float:
    """Return the difficulty of a row, from a field or its scores; NaN if it has none."""
    value = row.get(field)
    if field == "scores":
        positives, negatives = row.get("pos_scores"), row.get("neg_scores")
        value = max(negatives) - min(positives) if positives and negatives else None
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
