"""Training sources: each answers `draw(index, rng, negatives)` with one `Example`."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np

from jaxembed.config import DataConfig, PythonPackagesConfig, SourceConfig
from jaxembed.data import python_packages
from jaxembed.data.beir import BeirPairs
from jaxembed.data.drawers import Drawer, Labels, Pairs, Rows, ScoredPairs
from jaxembed.data.jsonl import JsonLines, first_row
from jaxembed.data.schema import Example, PairCheck, check_label, check_scored
from jaxembed.data.shuffle import key_of, permuted
from jaxembed.errors import UserError
from jaxembed.fields import LARGEST
from jaxembed.files import exists
from jaxembed.spec import Shot


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a config, opened."""

    config: SourceConfig
    name: str
    drawer: Drawer
    in_batch: bool
    digest: str

    def __len__(self) -> int:
        return min(len(self.drawer), self.config.max_examples or LARGEST)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        """The example at `index` as this visit sees it: all that is drawn, in-context examples too, is drawn by `rng`."""
        example = self.drawer.draw(self._row(index), rng, negatives)
        choices = self.config.instructions
        instruction = example.instruction or (choices[rng.integers(len(choices))] if choices else "")
        documents, shots = self.config.document_instruction, self._shots(index, example.query, instruction, rng)
        return dataclasses.replace(example, instruction=instruction, document_instruction=documents, shots=shots)

    def _row(self, index: int) -> int:
        """Where an example lies among the drawer's: where not all are used, at a place drawn by their content."""
        if len(self) == len(self.drawer):
            return index
        return int(permuted(np.array([index]), len(self.drawer), key_of(self.digest))[0])

    def _shots(self, index: int, query: str, instruction: str, rng: np.random.Generator) -> tuple[Shot, ...]:
        """In-context examples out of other rows that ask something else; fewer than drawn where there are not as many.

        Each stands under its row's own instruction, if it has one, else under the query's.
        """
        chosen = self.config.few_shot
        if chosen is None or rng.random() < chosen.zero_shot:
            return ()
        count = int(rng.integers(1, chosen.most + 1))
        rows = rng.choice(len(self), min(len(self), 2 * count + 1), replace=False)
        drawn = (self.drawer.draw(self._row(int(row)), rng, 0) for row in rows if row != index)
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
