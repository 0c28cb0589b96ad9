"""The texts of MTEB tasks, which training files must not contain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from jaxembed.evaluation.mteb_items import get_split, load_data

ROLES = {"queries": "queries", "corpus": "documents"}  # role of each part of a retrieval split
OTHER_COLUMNS = ("label", "labels", "label_text", "lang", "id", "idx")  # columns whose values are no texts of a task


def list_task_texts(task: Any) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield the role and the texts of every part of an mteb task's scored splits.

    Every column with texts counts, except labels, languages and ids. The training split of a classification task is not scored.
    """
    with load_data(task):
        if hasattr(task, "convert_v1_dataset_format_to_v2"):
            task.convert_v1_dataset_format_to_v2(None)
        for split_name in task.eval_splits:
            for subset in task.hf_subsets:
                yield from _iter_split(get_split(task, subset, split_name), getattr(task, "label_column_name", "label"))


def _iter_split(split: Any, label_column: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the role and the texts of every part of a split."""
    if isinstance(split, dict):  # retrieval
        for part, role in ROLES.items():
            yield role, [join_title(row) for row in iter_rows(split[part])]
    else:
        yield from (("texts", texts) for texts in _iter_text_columns(split, {*OTHER_COLUMNS, label_column}))


def iter_rows(part: Any) -> Iterator[Any]:
    """Yield the rows of a corpus or of queries, given as a dataset or as a mapping from id to row."""
    return iter(part.values()) if isinstance(part, dict) else iter(part)


def join_title(row: Any) -> str:
    """Return title and text of a document or query."""
    if isinstance(row, str):
        return row
    return f"{row.get('title') or ''} {row.get('text') or ''}".strip()


def _iter_text_columns(split: Any, other_columns: Collection[str]) -> Iterator[list[str]]:
    """Yield the texts of every column, except the other ones. Lists are flattened."""
    for name in split.column_names:
        if name not in other_columns and (texts := [text for value in split[name] for text in _flatten(value)]):
            yield texts


def _flatten(value: Any) -> Iterable[str]:
    """Return the texts in a value: a text, nested lists of texts, or none for other values."""
    if isinstance(value, str):
        return (value,)
    return (text for entry in value for text in _flatten(entry)) if isinstance(value, list) else ()
