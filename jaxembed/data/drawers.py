"""How a row of a file becomes a training example: the shape of the rows decides how a positive and negatives are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxembed.data.rows import AtLeast, Rows
from jaxembed.data.schema import Example


class ReadRows(Protocol):
    """Rows by their numbers, wherever they come from."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Drawer(Protocol):
    """Draws examples from rows; no example has more than `most_positives` positives."""

    most_positives: int

    def __len__(self) -> int: ...
    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example: ...


class Pairs:
    """Rows of the main format. One positive is drawn; up to `negatives` of the row's own negatives are."""

    def __init__(self, rows: ReadRows, most_positives: int):
        self.rows = rows
        self.most_positives = most_positives

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


class ScoredPairs:
    """(sentence1, sentence2, score) rows at or above a score: positives of each other, in a drawn direction."""

    most_positives = 1

    def __init__(self, rows: Rows, min_score: float):
        self.rows = rows
        self._kept = AtLeast(rows.numbers, min_score)
        self.dropped = len(rows) - len(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        row = self.rows[self._kept[index]]
        pair = (row["sentence1"], row["sentence2"])
        query, positive = pair if rng.integers(2) else pair[::-1]
        return Example(query, positive, (), (positive,), score=float(row["score"]))


class Labels:
    """(text, label) rows, after NV-Embed 4.2 and 5.3.4.

    With `by_label` the label's text is the positive and other labels the negatives; otherwise another example of the
    same label is the positive and examples of other labels the negatives.
    """

    most_positives = 2

    def __init__(self, rows: Rows, by_label: bool | None):
        self.rows = rows
        self._names, self._ends = rows.names, np.cumsum(rows.counts)
        self._by_label = len(self._names) == 2 if by_label is None else by_label

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        label, text = int(self.rows.numbers[index]), self.rows[index]["text"]
        others = [i for i in range(len(self._names)) if i != label]
        if self._by_label:
            positive = self._names[label]
            found = [self._names[i] for i in _sample(others, negatives, rng)]
        else:
            positive = self._example(label, rng, besides=index)
            picked: Any = rng.choice(others, negatives) if others and negatives else []
            found = [self._example(int(i), rng) for i in picked]
        found = [n for n in dict.fromkeys(found) if n not in (text, positive)]
        return Example(text, positive, tuple(found), (positive, text), label=label)

    def _example(self, label: int, rng: np.random.Generator, besides: int = -1) -> str:
        """A text of a label, another one than the row `besides` if there is one."""
        members = self.rows.by_label[self._ends[label] - self.rows.counts[label] : self._ends[label]]  # ascending
        if besides < 0 or len(members) == 1:
            return str(self.rows[members[rng.integers(len(members))]]["text"])
        drawn = rng.integers(len(members) - 1)
        return str(self.rows[members[drawn + (drawn >= np.searchsorted(members, besides))]]["text"])


class Texts:
    """Texts alone: each is its own positive, and the other texts of a batch are its negatives (SimCSE, arXiv:2104.08821)."""

    most_positives = 1

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        text = self.rows[index]["text"]
        return Example(text, text, (), (text,))


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
