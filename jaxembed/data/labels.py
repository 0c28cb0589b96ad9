"""Classification and clustering data as pairs: the documents are label texts, or other examples."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.rows import Rows
from jaxembed.data.sampling import ExampleSampler
from jaxembed.data.schema import Example, Row
from jaxembed.errors import UserError

SHOWN = 10  # labels that an error lists
EXAMPLES = 8  # positives, and negatives, of a row of pairs where there is no end of them


class Labels(ExampleSampler):
    """(text, label) rows, after NV-Embed 4.2 and 5.3.4.

    Documents are label texts (two labels, or chosen so): the label's text is the positive, those of other labels the
    negatives, of this source or, after KaLM-Embedding 2.1, of all (`among`). Or they are examples: another text of the
    label is the positive, texts of other labels, drawn evenly over the labels, the negatives.
    """

    most_positives = 2

    def __init__(self, rows: Rows, config: SourceConfig):
        self.rows = rows
        self._path = config.path
        text_of = self._spelled_out(config)
        self._texts = sorted(set(text_of))
        place = {text: i for i, text in enumerate(self._texts)}
        self._label = [place[text] for text in text_of]  # of each of the rows' labels
        self._ends = np.cumsum(rows.counts)
        self._pool = tuple(self._texts)
        self._by_label = {"auto": len(self._texts) == 2, "labels": True, "examples": False}[config.label_documents]
        self._kept: Sequence[int] | np.ndarray = range(len(rows))
        self.dropped: dict[str, int] = {}
        if not self._by_label:
            self._keep_those_with_positives(config)

    @property
    def label_texts(self) -> tuple[str, ...]:
        """The documents that are label texts; none where documents are examples."""
        return tuple(self._texts) if self._by_label else ()

    @property
    def sizes(self) -> Counter[str]:
        """How many rows each label has, by its text."""
        sizes = Counter[str]()
        for label, count in zip(self._label, self.rows.counts, strict=True):
            sizes[self._texts[label]] += count
        return sizes

    def among(self, texts: Sequence[str]) -> Labels:
        """The same, its negatives drawn from `texts` too."""
        made = copy.copy(self)
        made._pool = tuple(dict.fromkeys((*self._texts, *texts)))
        return made

    def __len__(self) -> int:
        return len(self._kept)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        text, label, (positive,), found = self._drawn(index, rng, 1, negatives)
        return Example(text, positive, tuple(found), (positive, text), label=label)

    def pairs(self, index: int, seed: int, most: int | None) -> Iterator[Row]:
        """The text with its label and `most` others, or with `most` examples of its label and of others."""
        count = most or (len(self._pool) if self._by_label else EXAMPLES)
        text, _, positives, found = self._drawn(index, np.random.default_rng((seed, index)), count, count)
        yield {"query": text, "pos": positives, "neg": found}

    def _drawn(
        self, index: int, rng: np.random.Generator, positives: int, negatives: int
    ) -> tuple[str, int, list[str], list[str]]:
        """A text, its label, and so many different positives and negatives at most."""
        row = int(self._kept[index])
        text, label = self._text(row), self._label[int(self.rows.numbers[row])]
        if self._by_label:
            answers = [self._texts[label]]
            found = [self._pool[i] for i in _besides(label, len(self._pool), negatives, rng)]
        else:
            own = self._members(label)
            answers = [self._text(own[i]) for i in _besides(int(np.searchsorted(own, row)), len(own), positives, rng)]
            others = rng.integers(len(self._texts) - 1, size=negatives) if len(self._texts) > 1 else np.empty(0, int)
            found = [self._text(rng.choice(self._members(i))) for i in others + (others >= label)]
        return text, label, list(dict.fromkeys(answers)), [t for t in dict.fromkeys(found) if t not in (text, *answers)]

    def _text(self, row: int) -> str:
        return str(self.rows[int(row)]["text"])

    def _members(self, label: int) -> np.ndarray:
        """The rows of a label, ascending."""
        return self.rows.by_label[self._ends[label] - self.rows.counts[label] : self._ends[label]]

    def _spelled_out(self, config: SourceConfig) -> Sequence[str]:
        """The text of each label; `UserError` lists those that `label_names` lacks."""
        names = self.rows.names
        if not config.label_names:
            return names
        if absent := [name for name in names if name not in config.label_names]:
            raise UserError(f"{self._path}: label_names has no name for {_listed(absent)}; name every label of the data")
        return [config.label_names[name] for name in names]

    def _keep_those_with_positives(self, config: SourceConfig) -> None:
        """Leaves out texts without another example of their label, or raises `UserError`, as `single_labels` says."""
        if config.label_names or config.label_negatives == "all":
            key = "label_names" if config.label_names else "label_negatives=all"
            raise UserError(
                f"{self._path}: {key} is about label texts, but the documents of its {len(self._texts)} labels are examples; "
                f"set label_documents to labels, or leave {key} out"
            )
        counts = np.array(self.rows.counts)
        single = np.flatnonzero(counts == 1)
        if not len(single):
            return
        if len(single) == len(counts):
            raise UserError(f"{self._path}: no label has two texts, each other's positives; set label_documents to labels")
        if config.single_labels == "error":
            raise UserError(
                f"{self._path}: {len(single):,} of {len(counts):,} labels have one text, without another as its positive: "
                f"{_listed([self._texts[i] for i in single])}; add texts, or set single_labels to skip"
            )
        self._kept = np.flatnonzero((counts > 1)[self.rows.numbers.astype(np.int32)]).astype(np.int32)
        self.dropped = {"label with one text": len(single)}


def _besides(place: int, count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `most` different numbers below `count`, none of them `place`."""
    drawn = rng.choice(count - 1, min(most, count - 1), replace=False)
    return drawn + (drawn >= place)


def _listed(labels: Sequence[str]) -> str:
    """The first of some labels."""
    more = f" and {len(labels) - SHOWN:,} more" if len(labels) > SHOWN else ""
    return f"{', '.join(map(repr, labels[:SHOWN]))}{more}"
