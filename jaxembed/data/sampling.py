"""How a row of a file becomes a training example: the shape of the rows decides how a positive and negatives are drawn.

Labels and documents have files of their own; entailment (`nli.py`) and BEIR folders (`beir.py`) are read as rows of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.rows import Rows, RowsAbove
from jaxembed.data.schema import Example, Row
from jaxembed.errors import UserError


class ReadRows(Protocol):
    """Rows by their numbers, wherever they come from."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class ExampleSampler(Protocol):
    """Draws examples from rows; no example has more than `most_positives` positives.

    `dropped` counts what is not drawn from, by the reason. `pairs` gives an example as rows of the main format, all at once
    instead of drawn, for conversion and mining; where a source has no end of positives and negatives, `most` of each, chosen
    by (seed, index), or for None all label texts, or 8 examples.
    """

    most_positives: int
    dropped: dict[str, int]

    def __len__(self) -> int: ...
    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example: ...
    def pairs(self, index: int, seed: int, most: int | None) -> Iterator[Row]: ...


class Pairs(ExampleSampler):
    """Rows of the main format. One positive is drawn; up to `negatives` of the row's own negatives are."""

    def __init__(self, rows: ReadRows, most_positives: int, dropped: dict[str, int] | None = None):
        self.rows = rows
        self.most_positives = most_positives
        self.dropped = dropped or {}

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        row = self.rows[index]
        positives = tuple(dict.fromkeys(row["pos"]))
        others = [text for text in dict.fromkeys(row.get("neg", ())) if text not in positives]
        positive = positives[rng.integers(len(positives))]
        drawn = tuple(_sample(others, negatives, rng))
        return Example(
            query=row["query"],
            positive=positive,
            negatives=drawn,
            positives=positives,
            instruction=row.get("prompt", ""),
            teacher_scores=_teacher_scores(row, (positive, *drawn)),
        )

    def pairs(self, index: int, seed: int, most: int | None) -> Iterator[Row]:
        yield self.rows[index]


class ScoredPairs(ExampleSampler):
    """(sentence1, sentence2, score) rows at or above a score: positives of each other, in a drawn direction.

    NV-Embed 4.2 makes two examples of such a row; over the visits a row here is both. It has no negatives of its own:
    NV-Embed mines them.
    """

    most_positives = 1

    def __init__(self, rows: Rows, config: SourceConfig):
        self.rows = rows
        self._kept = RowsAbove(rows.numbers, config.min_score)
        self.dropped = {"score below min_score": len(rows) - len(self._kept)}
        if not len(self._kept):
            raise UserError(f"{config.path}: no pair scores {config.min_score} or more; lower the source's min_score")

    def __len__(self) -> int:
        return len(self._kept)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        pair, score = self._pair(index)
        query, positive = pair if rng.integers(2) else pair[::-1]
        return Example(query, positive, (), (positive,), score=score)

    def pairs(self, index: int, seed: int, most: int | None) -> Iterator[Row]:
        """Both directions."""
        (first, second), _ = self._pair(index)
        yield from ({"query": first, "pos": [second]}, {"query": second, "pos": [first]})

    def _pair(self, index: int) -> tuple[tuple[str, str], float]:
        row = self.rows[self._kept[index]]
        return (row["sentence1"], row["sentence2"]), float(row["score"])


class Texts(ExampleSampler):
    """Texts alone: each is its own positive, and the other texts of a batch are its negatives (SimCSE, arXiv:2104.08821)."""

    most_positives = 1

    def __init__(self, rows: Rows):
        self.rows = rows
        self.dropped: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        text = self.rows[index]["text"]
        return Example(text, text, (), (text,))

    def pairs(self, index: int, seed: int, most: int | None) -> Iterator[Row]:
        text = self.rows[index]["text"]
        yield {"query": text, "pos": [text]}


def iter_rows(rows: ReadRows) -> Iterator[Row]:
    """All rows once, in order."""
    return (rows[i] for i in range(len(rows)))


def _teacher_scores(row: Mapping[str, Any], texts: Sequence[str]) -> tuple[float, ...]:
    """The row's scores of texts among its positives and negatives, NaN for those that it does not score; none without any."""
    scores: dict[str, float] = {}
    for field in ("neg", "pos"):
        scores |= dict(zip(row.get(field, ()), row.get(f"{field}_scores") or (), strict=False))
    return tuple(scores.get(text, float("nan")) for text in texts) if scores else ()


def _sample(items: Sequence[Any], count: int, rng: np.random.Generator) -> Sequence[Any]:
    if len(items) <= count:
        return items
    return [items[i] for i in rng.choice(len(items), count, replace=False)]
