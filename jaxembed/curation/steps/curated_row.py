"""The rows of a curation and their sides: query, positives and negatives, for rows of any format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxembed.config.curation import ALL_SIDES, Side
from jaxembed.data.equality import hash_exact_text
from jaxembed.data.schema import Row, is_text

# By format: the field of each side that is a single text. Below: the field of each side that is a list of texts.
SINGLE_FIELDS: dict[str, dict[Side, str]] = {
    "pairs": {"query": "query"},
    "scored_pairs": {"query": "sentence1", "positives": "sentence2"},
    "labels": {"query": "text"},
    "text": {"query": "text"},
}
LIST_FIELDS_BY_SIDE: dict[Side, str] = {"positives": "pos", "negatives": "neg"}
EMPTY_TEXT = "empty"
ROW_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)
SORTED_ROW_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True)


class CuratedRow(NamedTuple):
    """A row that passes through the steps.

    Attributes:
        source: Index of its source.
        number: Number of the row in the source, counted from 1.
        format: Format of the row: pairs, scored_pairs, labels, or text.
        fields: Its fields, as in the file.
    """

    source: int
    number: int
    format: str
    fields: Row


class StepOutcome(NamedTuple):
    """What a step returns for a row: the row, or None if it is dropped, and a reason for each change or drop."""

    row: Row | None
    reasons: tuple[str, ...] = ()


class RowStepError(Exception):
    """A step failed for a row. The engine adds the location of the row."""

    def __init__(self, row: CuratedRow, problem: str):
        """Keep the row and what is wrong, with advice."""
        super().__init__(row, problem)
        self.row, self.problem = row, problem


RowStep = Callable[[Sequence[CuratedRow]], list[StepOutcome]]


class PreparedStep(NamedTuple):
    """The function of a step that sees one row at a time, and a hash of what it depends on besides its config."""

    function: RowStep
    digest: str = ""


Problems = Mapping[Side, Sequence[str | None]]  # why each text of a side is dropped, or None


def has_side(format_name: str, side: Side) -> bool:
    """Return whether the rows of a format may have texts of a side."""
    return side in SINGLE_FIELDS[format_name] or format_name == "pairs"


def get_texts(curated: CuratedRow, side: Side) -> list[str]:
    """Return the texts of one side of a row; an empty list if it has none."""
    if field := SINGLE_FIELDS[curated.format].get(side):
        return [curated.fields[field]]
    return list(curated.fields.get(LIST_FIELDS_BY_SIDE[side]) or ()) if curated.format == "pairs" else []


def find_problems(
    curated: CuratedRow, sides: Sequence[Side], find_problem: Callable[[str], str | None]
) -> dict[Side, list[str | None]]:
    """Return the result of a check for each text of some sides of a row."""
    return {side: [find_problem(text) for text in get_texts(curated, side)] for side in sides}


def drop_texts(curated: CuratedRow, problems: Problems) -> StepOutcome:
    """Drop the texts of a row that have a problem. Without its query or any positive, the row is dropped."""
    row, reasons = dict(curated.fields), list[str]()
    for side in ALL_SIDES:
        found = [f"{side}: {problem}" for problem in problems.get(side, ()) if problem]
        if not found:
            continue
        if side in SINGLE_FIELDS[curated.format] or (side == "positives" and len(found) == len(problems[side])):
            return StepOutcome(None, tuple(found[:1]))
        reasons += found
        field = LIST_FIELDS_BY_SIDE[side]
        for key in (field, f"{field}_scores"):
            if row.get(key):
                row[key] = [value for value, problem in zip(row[key], problems[side], strict=True) if problem is None]
    return StepOutcome(row, tuple(reasons)) if reasons else StepOutcome(curated.fields)


def edit_texts(curated: CuratedRow, sides: Sequence[Side], edit: Callable[[str], tuple[str, list[str]]]) -> StepOutcome:
    """Edit the texts of a row, and drop those that become empty.

    Args:
        curated: The row.
        sides: Sides whose texts are edited.
        edit: Returns the new text, and the names of the edits that changed it.
    """
    row, reasons = dict(curated.fields), list[str]()
    problems: dict[Side, list[str | None]] = {}
    for side in sides:
        edited = [edit(text) for text in get_texts(curated, side)]
        problems[side] = [None if is_text(text) else EMPTY_TEXT for text, _ in edited]
        reasons += [f"{side}: changed by {change}" for _, changes in edited for change in changes]
        texts = [text for text, _ in edited]
        if field := SINGLE_FIELDS[curated.format].get(side):
            row[field] = texts[0]
        elif texts:
            row[LIST_FIELDS_BY_SIDE[side]] = texts
    if not reasons:
        return StepOutcome(curated.fields)
    outcome = drop_texts(curated._replace(fields=row), problems)
    return outcome if outcome.row is None else StepOutcome(outcome.row, (*reasons, *outcome.reasons))


def encode_row(row: Row) -> str:
    """Return a row as one line of JSON. Values without a JSON type, such as dates, become strings."""
    return ROW_ENCODER.encode(row)


def is_json(value: Any) -> bool:
    """Return whether a value is unchanged if it is written as JSON and read again."""
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(is_json, value.values()))
    if type(value) is list:
        return all(map(is_json, value))
    return value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def hash_row(row: Row, seed: int = 0) -> int:
    """Return a 64-bit hash of a seed and the content of a row. It does not depend on the order of the fields."""
    return int(hash_exact_text(f"{seed} {SORTED_ROW_ENCODER.encode(row)}").view("<u8")[0])
