"""Convert rows of a container to our field names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxembed.config.data import LIST_FIELDS
from jaxembed.data.csv_file import TextCells
from jaxembed.data.schema import NUMBER_FIELDS, Row, parse_row

Columns = Mapping[Any, str | Sequence[str]]  # our field -> the container's column, or columns for a field that is a list
CLASS_NUMBER = re.compile(r"-1|0|[1-9]\d{0,8}", re.ASCII)  # a label in a CSV file that is a number


def build_row(content: Any, where: str, columns: Columns) -> dict[str, Any]:
    """Return the content of a container as a row with our field names. A null is an absent field."""
    return drop_nulls(rename_columns(parse_content(content, where), columns))


def rename_columns(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a row with our field names.

    A field in `columns` is read only from its columns. A list field may have several columns, or one column with a single
    value. Nulls of these columns are left out.
    """
    is_untyped = isinstance(row, TextCells)
    if columns:
        sources = {name for names in columns.values() for name in list_columns(names)}
        others = {name: value for name, value in row.items() if name not in columns and name not in sources}
        row = others | {field: value for field, names in columns.items() for value in _read_columns(row, field, names)}
    return _convert_cells(row) if is_untyped else row


def list_columns(names: str | Sequence[str]) -> Sequence[str]:
    """Return the columns of a field."""
    return [names] if isinstance(names, str) else names


def _read_columns(row: Row, field: str, names: str | Sequence[str]) -> list[Any]:
    """Return the value of a field in a list, which is empty if the row has none of its columns."""
    column_values = [row[name] for name in list_columns(names) if name in row]
    if field not in LIST_FIELDS or not column_values or column_values == [None]:
        return column_values[:1]
    return [[item for value in column_values if value is not None for item in (value if isinstance(value, list) else [value])]]


def _convert_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a CSV file with numbers where our fields have numbers, and lists where they have lists."""
    converted = dict(row)
    for field in NUMBER_FIELDS:
        if isinstance(value := converted.get(field), str):
            converted[field] = _parse_number(value)
        elif isinstance(value, list):
            converted[field] = [_parse_number(item) if isinstance(item, str) else item for item in value]
    for field in LIST_FIELDS:
        if isinstance(converted.get(field), str | int | float):
            converted[field] = [converted[field]]
    if isinstance(label := converted.get("label"), str) and CLASS_NUMBER.fullmatch(label):
        converted["label"] = int(label)
    return converted


def _parse_number(text: str) -> float | str:
    """Return the number in a text, or the text if it holds none."""
    try:
        return float(text)
    except ValueError:
        return text


def drop_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its fields that are null."""
    return {name: value for name, value in row.items() if value is not None}


def parse_content(content: Any, where: str) -> dict[str, Any]:
    """Return the content of a container as a row with the container's column names."""
    return parse_row(content, where) if isinstance(content, bytes) else content
