"""Samplers turn the rows of a file into training examples. Each row schema draws positives and negatives in its own way.

Scored pairs, labels and documents have their own modules. Entailment (`nli.py`) and BEIR folders (`beir.py`) are read as
rows of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxembed.data.equality import exclude_equal
from jaxembed.data.rows import IndexedRows, RowSchema
from jaxembed.data.schema import Example, Row, check_pair

EXAMPLE_FIELD = "example"  # number of the example that a mined row belongs to; files of earlier versions have none
# Rows of pairs that were mined for a source. Rows with the same number are consecutive; a row without a number is one example.
MINED_SCHEMA = RowSchema("mined pairs", check_pair, lambda row: row.get(EXAMPLE_FIELD, -1))


class RowSequence(Protocol):
    """Rows by index, wherever they come from."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class ExampleSampler(Protocol):
    """Draws examples from rows.

    Attributes:
        max_positives: Maximum number of positives of an example.
        drop_counts: Reason -> number of rows, premises, queries, labels, or single texts that are not used.
    """

    max_positives: int
    drop_counts: dict[str, int]

    def __len__(self) -> int: ...

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw an example from the row or rows at `index`."""

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield everything that `draw` can draw at `index` as rows of pairs, for conversion and mining.

        Args:
            index: Which example.
            seed: Selects the texts, together with `index`, if a row could be paired with a whole source.
            max_texts: In that case, the maximum number of positives and of negatives. None: all label texts, or 8 examples.
        """


class PairSampler(ExampleSampler):
    """Draws from rows of pairs: one of a row's positives, and up to `max_negatives` of its own negatives.

    A negative that equals the query, a positive or another negative is not drawn (`data.equality`).
    """

    def __init__(self, rows: RowSequence, max_positives: int, drop_counts: dict[str, int] | None = None):
        """Draw from `rows`, none of which has more than `max_positives` positives."""
        self.rows = rows
        self.max_positives = max_positives
        self.drop_counts = drop_counts or {}

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw a positive and negatives of the row."""
        row = self.rows[index]
        positives = tuple(dict.fromkeys(row["pos"]))
        candidates = exclude_equal(row.get("neg", ()), (row["query"], *positives))
        positive = positives[rng.integers(len(positives))]
        negatives = tuple(_sample(candidates, max_negatives, rng))
        return Example(
            query=row["query"],
            positive=positive,
            negatives=negatives,
            positives=positives,
            instruction=row.get("prompt", ""),
            teacher_scores=_get_teacher_scores(row, (positive, *negatives)),
        )

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield the row itself."""
        yield self.rows[index]


class MinedPairSampler(PairSampler):
    """Draws from rows of pairs that were mined for another source. Rows of one of its examples become one example again.

    A similar pair has a row for each direction, and a document one for each template. One of the rows is drawn each time.
    """

    def __init__(self, rows: IndexedRows, max_positives: int):
        """Group the rows, which have the `MINED_SCHEMA`. None of them has more than `max_positives` positives."""
        super().__init__(rows, max_positives)
        numbers = rows.index_values
        is_first = np.concatenate([[True], (np.diff(numbers) != 0) | (numbers[1:] < 0)])
        self._starts = np.append(np.flatnonzero(is_first), len(numbers))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw a row of the example, then a positive and negatives of the row."""
        start, end = self._starts[index], self._starts[index + 1]
        return super().draw(int(start if end == start + 1 else rng.integers(start, end)), rng, max_negatives)

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield the rows of the example."""
        return (self.rows[row] for row in range(self._starts[index], self._starts[index + 1]))


class TextSampler(ExampleSampler):
    """Makes each text its own positive; the other texts of a batch are its negatives (SimCSE, arXiv:2104.08821)."""

    max_positives = 1

    def __init__(self, rows: RowSequence, drop_counts: dict[str, int]):
        """Draw from all rows."""
        self.rows = rows
        self.drop_counts = drop_counts

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Return the text as query and positive."""
        text = self.rows[index]["text"]
        return Example(query=text, positive=text, negatives=(), positives=(text,))

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield the text as a pair."""
        text = self.rows[index]["text"]
        yield {"query": text, "pos": [text]}


def iter_rows(rows: RowSequence) -> Iterator[Row]:
    """Yield all rows once, in order."""
    return iter(rows) if isinstance(rows, IndexedRows) else (rows[i] for i in range(len(rows)))


def _get_teacher_scores(row: Mapping[str, Any], texts: Sequence[str]) -> tuple[float, ...]:
    """Return the row's scores of `texts`, NaN for a text without a score, or () if the row has no scores."""
    scores: dict[str, float] = {}
    for field in ("neg", "pos"):
        scores |= dict(zip(row.get(field, ()), row.get(f"{field}_scores") or (), strict=False))
    return tuple(scores.get(text, float("nan")) for text in texts) if scores else ()


def _sample(items: Sequence[Any], count: int, rng: np.random.Generator) -> Sequence[Any]:
    """Draw up to `count` different items."""
    if len(items) <= count:
        return items
    return [items[i] for i in rng.choice(len(items), count, replace=False)]
