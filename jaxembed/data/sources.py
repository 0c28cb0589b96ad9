"""Training sources: each answers `draw(index, rng, negatives)` with one `Example`.

A source is its config plus rows of one of three shapes; the shape decides how a positive and negatives are drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxembed.config import DataConfig, PythonPackagesConfig, SourceConfig
from jaxembed.data import python_packages
from jaxembed.data.beir import BeirPairs
from jaxembed.data.jsonl import JsonLines, first_row
from jaxembed.data.schema import Example, PairCheck, check_label, check_scored
from jaxembed.errors import UserError
from jaxembed.files import exists
from jaxembed.spec import Shot


class Rows(Protocol):
    """Random access to what a file holds, and a digest of its content."""

    digest: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Drawer(Protocol):
    """Draws examples from rows; no example has more than `most_positives` positives."""

    most_positives: int

    def __len__(self) -> int: ...
    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example: ...


class Pairs:
    """Rows of the main format. One positive is drawn; up to `negatives` of the row's own negatives are."""

    def __init__(self, rows: Rows, most_positives: int):
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
        scores = np.array([rows[i]["score"] for i in range(len(rows))], np.float64)
        self._kept = np.flatnonzero(scores >= min_score)
        self.dropped = len(rows) - len(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        row = self.rows[int(self._kept[index])]
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
        labels = [str(rows[i]["label"]) for i in range(len(rows))]
        self._names, self._label = np.unique(labels, return_inverse=True)
        self._members = [np.flatnonzero(self._label == i) for i in range(len(self._names))]
        self._by_label = len(self._names) == 2 if by_label is None else by_label

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        label, text = int(self._label[index]), self.rows[index]["text"]
        others = [i for i in range(len(self._names)) if i != label]
        if self._by_label:
            positive = str(self._names[label])
            found = [str(self._names[i]) for i in _sample(others, negatives, rng)]
        else:
            positive = self._example(label, rng, besides=index)
            picked: Any = rng.choice(others, negatives) if others and negatives else []
            found = [self._example(int(i), rng) for i in picked]
        found = [n for n in dict.fromkeys(found) if n not in (text, positive)]
        return Example(text, positive, tuple(found), (positive, text), label=label)

    def _example(self, label: int, rng: np.random.Generator, besides: int = -1) -> str:
        members = self._members[label]
        members = members[members != besides] if len(members) > 1 else members
        return str(self.rows[int(rng.choice(members))]["text"])


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


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a config, opened."""

    config: SourceConfig
    name: str
    drawer: Drawer
    in_batch: bool
    digest: str

    def __len__(self) -> int:
        return len(self.drawer)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        """The example at `index` as this visit sees it: all that is drawn, in-context examples too, is drawn by `rng`."""
        example = self.drawer.draw(index, rng, negatives)
        choices = self.config.instructions
        instruction = example.instruction or (choices[rng.integers(len(choices))] if choices else "")
        documents, shots = self.config.document_instruction, self._shots(index, example.query, instruction, rng)
        return dataclasses.replace(example, instruction=instruction, document_instruction=documents, shots=shots)

    def _shots(self, index: int, query: str, instruction: str, rng: np.random.Generator) -> tuple[Shot, ...]:
        """In-context examples out of other rows that ask something else; fewer than drawn where there are not as many.

        Each stands under its row's own instruction, if it has one, else under the query's.
        """
        chosen = self.config.few_shot
        if chosen is None or rng.random() < chosen.zero_shot:
            return ()
        count = int(rng.integers(1, chosen.most + 1))
        rows = rng.choice(len(self), min(len(self), 2 * count + 1), replace=False)
        drawn = (self.drawer.draw(int(row), rng, 0) for row in rows if row != index)
        shots = (Shot(e.instruction or instruction, e.query, e.positive) for e in drawn if e.query != query)
        return tuple(islice(shots, count))


def open_sources(config: DataConfig, cache: Path) -> list[Source]:
    """Opens and checks every source of a config; `UserError` names file and line of the first bad row."""
    return [open_source(source, config.python_packages, cache) for source in config.sources]


def open_source(config: SourceConfig, packages: PythonPackagesConfig, cache: Path) -> Source:
    path = Path(config.path)
    kind = detect_format(config)
    if kind == "python_packages":
        path = packages_folder(packages, cache) / "train.jsonl"
    rows: Rows
    drawer: Drawer
    if kind == "labels":
        rows = JsonLines(path, check_label)
        drawer = Labels(rows, {"auto": None, "labels": True, "examples": False}[config.label_documents])
    elif kind == "scored_pairs":
        rows = JsonLines(path, check_scored)
        drawer = ScoredPairs(rows, config.min_score)
        if not len(drawer):
            raise UserError(f"{path}: no pair scores {config.min_score} or more; lower the source's min_score")
    elif kind == "beir":
        rows = BeirPairs(path)
        drawer = Pairs(rows, rows.most_positives)
    else:
        check = PairCheck()
        rows = JsonLines(path, check)
        drawer = Pairs(rows, check.most_positives)
    in_batch = kind != "labels" if config.in_batch_negatives is None else config.in_batch_negatives
    return Source(config, config.name or Path(config.path).stem, drawer, in_batch, rows.digest)


def detect_format(config: SourceConfig) -> str:
    """The source's format, read off its path or its first row where the config leaves it open."""
    if "python_packages" in (config.path, config.format):
        return "python_packages"
    path = Path(config.path)
    if not exists(path):
        raise UserError(f"data.sources: {path}: no such file or folder")
    if config.format != "auto":
        return config.format
    if path.is_dir():
        return "beir"
    keys = set(first_row(path))
    for kind, needed in (
        ("pairs", {"query", "pos"}),
        ("scored_pairs", {"sentence1", "score"}),
        ("labels", {"text", "label"}),
    ):
        if needed <= keys:
            return kind
    if "query" in keys:
        return "pairs"
    raise UserError(
        f"{path}:1: unknown row with keys {', '.join(sorted(keys)[:10])}; expected query and pos, text and label, "
        "or sentence1, sentence2 and score"
    )


def packages_folder(config: PythonPackagesConfig, cache: Path) -> Path:
    """The folder with pairs and held-out sets out of the environment's Python packages; made on the first call."""
    return python_packages.extract(config.packages, config.holdout_package, config.holdout_functions, cache)
