"""Filters of a source: metadata that its rows must have (`where`), and the length of their texts (`min_chars`, `max_chars`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from jaxembed.config import SourceConfig
from jaxembed.config.data import Where
from jaxembed.config.yaml_text import format_scalar
from jaxembed.data.chat import read_messages
from jaxembed.data.rows import RowSchema
from jaxembed.data.schema import Row, get_nli_fields

# Spellings of truth values in a config (YAML 1.1).
TRUE_WORDS, FALSE_WORDS = frozenset({"true", "yes", "on"}), frozenset({"false", "no", "off"})
TOO_SHORT = "shorter than min_chars"
TOO_LONG = "longer than max_chars"
FILTER_KEYS = {"where", "min_chars", "max_chars"}
# The texts that a row needs. Those of `nli` rows may have other names (`get_nli_fields`); of a chat they are all messages.
REQUIRED_TEXTS = {"pairs": ("query",), "scored_pairs": ("sentence1", "sentence2"), "labels": ("text",), "text": ("text",)}
LISTED_TEXTS = {"pos": "positives", "neg": "negatives"}  # lists of texts in a row of pairs, which lose single entries


class RowFilters(Protocol):
    """The keys of a section that select rows and texts: of a source, or of a step of a curation."""

    @property
    def where(self) -> Where:
        """Values that a field of a row must have."""

    @property
    def min_chars(self) -> int:
        """Minimum characters of a text."""

    @property
    def max_chars(self) -> int | None:
        """Maximum characters of a text."""


def has_filters(config: SourceConfig) -> bool:
    """Return whether a source leaves out rows or texts by its filters."""
    return bool(config.where or config.min_chars or config.max_chars)


def add_filters(schema: RowSchema, config: SourceConfig) -> RowSchema:
    """Return the schema of a format with the filters of a source: rows and texts that fail them are left out.

    A row is left out if it lacks the metadata of `where`, or if its query or another text that it needs is too short or too
    long. Single positives and negatives of a row of pairs are left out too. A row without positives is left out. Rows that
    `where` leaves out are not checked.
    """
    if not has_filters(config):
        return schema

    def check(row: Row) -> str | None:
        return None if find_where_mismatch(row, config) else schema.check(row)

    def index_value(row: Row) -> float | str | None:
        kept_row, _ = filter_row(row, schema.name, config)
        return None if kept_row is None else schema.index_value(kept_row)

    def find_drops(row: Row) -> Iterable[str]:
        kept_row, reasons = filter_row(row, schema.name, config)
        return reasons if kept_row is None else [*reasons, *schema.find_drops(kept_row)]

    return RowSchema(
        name=f"{schema.name} filtered by {config.model_dump_json(include=FILTER_KEYS)}",
        check=check,
        index_value=index_value,
        find_drops=find_drops,
        select=lambda row: filter_row(row, schema.name, config)[0] or row,
    )


def filter_row(row: Row, format_name: str, config: SourceConfig) -> tuple[Row | None, list[str]]:
    """Apply the filters of a source to a row that is valid where `where` matches.

    Returns:
        The row with the positives and negatives that pass, or None if the row is left out, and a reason for everything that
        is left out.
    """
    if mismatch := find_where_mismatch(row, config):
        return None, [mismatch]
    if problem := find_length_problem(_list_required_texts(row, format_name), config):
        return None, [problem]
    if format_name != "pairs":
        return row, []
    kept_row, reasons = dict(row), list[str]()
    for field, description in LISTED_TEXTS.items():
        problems = [find_length_problem([text], config) for text in row.get(field, ())]
        if field == "pos" and all(problems):
            return None, problems[:1]  # type: ignore[return-value]
        reasons += [f"{description} {problem}" for problem in problems if problem]
        for key in (field, f"{field}_scores"):
            if key in row:
                kept_row[key] = [value for value, problem in zip(row[key], problems, strict=True) if problem is None]
    return kept_row, reasons


def _list_required_texts(row: Row, format_name: str) -> list[str]:
    if format_name == "chat":
        return [message["content"] for message in read_messages(row)]
    fields = get_nli_fields(row) if format_name == "nli" else REQUIRED_TEXTS[format_name]
    return [row[field] for field in fields]


def find_where_mismatch(row: Row, config: RowFilters) -> str | None:
    """Return the first field of `where` whose value a row does not have, as the reason for leaving it out, or None."""
    for field, allowed_values in config.where.items():
        if not any(_equals_setting(row.get(field), allowed) for allowed in allowed_values):
            return describe_where(field)
    return None


def describe_where(field: str) -> str:
    """Return the reason for leaving out a row by a field of `where`."""
    return f"where {field}"


def find_length_problem(texts: Sequence[str], config: RowFilters) -> str | None:
    """Return `TOO_SHORT` or `TOO_LONG` if one of the texts has fewer or more characters than allowed, otherwise None."""
    lengths = [len(text) for text in texts]
    if min(lengths) < config.min_chars:
        return TOO_SHORT
    return TOO_LONG if config.max_chars and max(lengths) > config.max_chars else None


def _equals_setting(value: Any, setting: bool | int | float | str) -> bool:
    """Return whether a value of a row equals one of the config, as a value of the row's type.

    YAML reads `5` as a number, and `no` and `1.10` as texts. Rows may have either type.
    """
    text = format_scalar(setting)
    if isinstance(value, bool):
        return text.lower() in (TRUE_WORDS if value else FALSE_WORDS)
    if isinstance(value, int | float) and not isinstance(setting, bool):
        try:
            return value == (float(text) if isinstance(setting, str) else setting)
        except ValueError:
            return False
    return isinstance(value, str) and value == text
