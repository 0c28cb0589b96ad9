"""Training sources: each answers `draw(index, rng, negatives)` with one `Example`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set
from itertools import chain, islice
from pathlib import Path

import numpy as np

from jaxembed.config import DataConfig, PythonPackagesConfig, SourceConfig
from jaxembed.config.fields import LARGEST
from jaxembed.config.spec import FewShotExample
from jaxembed.curation import python_packages
from jaxembed.data.beir import BeirPairs
from jaxembed.data.containers import Container, is_beir, open_container
from jaxembed.data.documents import Documents, document_shape
from jaxembed.data.labels import Labels
from jaxembed.data.nli import SHAPE as NLI
from jaxembed.data.nli import NliPairs
from jaxembed.data.rows import Rows, RowSchema, as_row, scan
from jaxembed.data.sampling import ExampleSampler, Pairs, ScoredPairs, Texts
from jaxembed.data.schema import (
    NLI_LABELS,
    Example,
    Row,
    check_document,
    check_label,
    check_pair,
    check_scored,
    check_text,
    fields_of,
)
from jaxembed.data.shuffle import key_of, permuted
from jaxembed.errors import UserError

SHAPES = {
    shape.name: shape
    for shape in (
        RowSchema("pairs", check_pair, lambda row: len(row["pos"])),
        RowSchema("scored_pairs", check_scored, lambda row: row["score"]),
        RowSchema("labels", check_label, lambda row: str(row["label"])),
        NLI,
        RowSchema("text", check_text),
        RowSchema("documents", check_document),  # of which `document_shape` keeps what a source makes of them
    )
}
# The fields by which the shape of rows is recognised, the first that fits.
KEYS = {
    "pairs": {"query", "pos"}, "scored_pairs": {"sentence1", "score"}, "labels": {"text", "label"},
    "nli": {"premise", "hypothesis", "label"}, "text": {"text"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a config, opened: `format` is the shape of its rows, or beir, and `rows` how many there are."""

    config: SourceConfig
    name: str
    sampler: ExampleSampler
    in_batch: bool
    digest: str
    format: str
    rows: int

    def __len__(self) -> int:
        return min(len(self.sampler), self.config.max_examples or LARGEST)

    def as_pairs(self, seed: int = 0, most: int | None = None) -> Iterator[Row]:
        """Every example that is used as rows of the main format, in order (`ExampleSampler.pairs`)."""
        return chain.from_iterable(self.sampler.pairs(self._row(index), seed, most) for index in range(len(self)))

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        """The example at `index` as this visit sees it: all that is drawn, in-context examples too, is drawn by `rng`."""
        example = self.sampler.draw(self._row(index), rng, negatives)
        choices = self.config.instructions
        instruction = example.instruction or (choices[rng.integers(len(choices))] if choices else "")
        documents = self.config.instruction_of_documents(instruction)
        shots = self._shots(index, example.query, instruction, rng)
        return dataclasses.replace(example, instruction=instruction, document_instruction=documents, shots=shots)

    def _row(self, index: int) -> int:
        """Where an example lies among the drawer's: where not all are used, at a place drawn by their content."""
        if len(self) == len(self.sampler):
            return index
        return int(permuted(np.array([index]), len(self.sampler), key_of(self.digest))[0])

    def _shots(self, index: int, query: str, instruction: str, rng: np.random.Generator) -> tuple[FewShotExample, ...]:
        """In-context examples out of other rows that ask something else; fewer than drawn where there are not as many.

        Each stands under its row's own instruction, if it has one, else under the query's.
        """
        chosen = self.config.few_shot
        if chosen is None or rng.random() < chosen.zero_shot:
            return ()
        count = int(rng.integers(1, chosen.most + 1))
        rows = rng.choice(len(self), min(len(self), 2 * count + 1), replace=False)
        drawn = (self.sampler.draw(self._row(int(row)), rng, 0) for row in rows if row != index)
        shots = (FewShotExample(e.instruction or instruction, e.query, e.positive) for e in drawn if e.query != query)
        return tuple(islice(shots, count))


def open_sources(config: DataConfig, cache: Path) -> list[Source]:
    """Opens and checks every source of a config; `UserError` names file and line of the first bad row."""
    return _sharing_labels([open_source(source, config.python_packages, cache) for source in config.sources])


def _sharing_labels(sources: list[Source]) -> list[Source]:
    """The same; those that ask for it draw their negatives from the label texts of all."""
    labels = {i: source.sampler for i, source in enumerate(sources) if isinstance(source.sampler, Labels)}
    texts = [text for sampler in labels.values() for text in sampler.label_texts]
    return [
        dataclasses.replace(source, sampler=labels[i].among(texts))
        if i in labels and source.config.label_negatives == "all"
        else source
        for i, source in enumerate(sources)
    ]


def open_source(config: SourceConfig, packages: PythonPackagesConfig, cache: Path) -> Source:
    kind, rows = open_rows(config, packages, cache)
    sampler: ExampleSampler
    if isinstance(rows, BeirPairs | NliPairs):
        sampler = Pairs(rows, rows.most_positives, rows.dropped)
    elif kind == "labels":
        sampler = Labels(rows, config)
    elif kind == "scored_pairs":
        sampler = ScoredPairs(rows, config)
    elif kind == "documents":
        sampler = Documents(rows, config)
    elif kind == "text":
        sampler = Texts(rows)
    else:
        sampler = Pairs(rows, int(rows.largest))
    in_batch = kind != "labels" if config.in_batch_negatives is None else config.in_batch_negatives
    count = len(rows) if isinstance(rows, Rows) else rows.row_count
    return Source(config, config.display_name, sampler, in_batch, rows.digest, kind, count)


def open_rows(config: SourceConfig, packages: PythonPackagesConfig, cache: Path) -> tuple[str, Rows | BeirPairs | NliPairs]:
    """The rows of a source, all of them checked, and the name of their shape, or beir."""
    kind, container = open_unchecked(config, packages, cache)
    if container is None:
        return kind, BeirPairs(Path(config.path))
    rows = Rows(container, document_shape(config) if kind == "documents" else SHAPES[kind], cache, config.columns)
    return kind, NliPairs(rows) if kind == "nli" else rows


def open_unchecked(config: SourceConfig, packages: PythonPackagesConfig, cache: Path) -> tuple[str, Container | None]:
    """The name of a source's shape and its rows before any check; of a BEIR folder none."""
    if "python_packages" in (config.path, config.format):
        return "pairs", open_container(str(packages_folder(packages, cache) / "train.jsonl"))
    return _recognised(config)


def detect_format(config: SourceConfig) -> str:
    """The source's format, read off its path or its first row where the config leaves it open."""
    return "python_packages" if "python_packages" in (config.path, config.format) else _recognised(config)[0]


def _recognised(config: SourceConfig) -> tuple[str, Container | None]:
    """The format of a source that is there, and its container; of a BEIR folder none."""
    if config.format == "beir" or (config.format == "auto" and is_beir(Path(config.path))):
        if config.columns:
            raise UserError(f"{config.path}: columns are of rows; a BEIR folder has its own fields: leave them out")
        return "beir", None
    container = open_container(config.path)
    if config.format != "auto":
        return config.format, container
    if config.pair_templates:
        return "documents", container
    _, where, content = next(scan(container))
    return _shape_of(as_row(content, where, config.columns), where, {*config.columns}), container


def _shape_of(row: Row, where: str, named: Set[str]) -> str:
    """The name of the shape that a row's fields tell, those that `columns` names among them.

    Where a number is the label of (sentence1, sentence2, label), they do not: it is 0 of entailments, 1 of paraphrases.
    """
    fields = row.keys() | named
    found = [name for name, needed in KEYS.items() if needed <= fields]
    if found or "query" in fields:
        return next(iter(found), "pairs")
    if {"sentence1", "sentence2", "label"} <= fields:
        if isinstance(label := row.get("label"), str) and label in NLI_LABELS:
            return "nli"
        raise UserError(
            f"{where}: sentence1, sentence2 and a label that is neither entailment, neutral nor contradiction; if 0 is "
            "entailment, 1 neutral and 2 contradiction, set the source's format to nli"
        )
    raise UserError(
        f"{where}: unknown row with keys {fields_of(row)}; expected query and pos, text and label, "
        "sentence1, sentence2 and score, premise, hypothesis and label, or text; or name the columns that hold them in the "
        "source's columns, or make pairs of other fields by its pair_templates"
    )


def packages_folder(config: PythonPackagesConfig, cache: Path) -> Path:
    """The folder with pairs and held-out sets out of the environment's Python packages; made on the first call."""
    return python_packages.extract(config.packages, config.holdout_package, config.holdout_functions, cache)
