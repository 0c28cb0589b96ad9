"""Training sources: each one opens its data and draws examples from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set
from itertools import islice
from pathlib import Path

import numpy as np

from jaxembed.config import DataConfig, SourceConfig
from jaxembed.config.catalog import check_has_path
from jaxembed.config.fields import MAX_INTEGER
from jaxembed.config.spec import FewShotExample
from jaxembed.data.beir import BeirPairRows
from jaxembed.data.chat import ChatSampler, check_chat
from jaxembed.data.columns import parse_content, rename_columns
from jaxembed.data.containers import Container, is_beir_folder, name_split, open_container
from jaxembed.data.documents import DocumentSampler, make_document_schema
from jaxembed.data.equality import normalize_text
from jaxembed.data.filters import add_filters
from jaxembed.data.labels import LabelSampler
from jaxembed.data.nli import NLI_SCHEMA, NliPairRows
from jaxembed.data.rows import IndexedRows, RowSchema, scan_with_progress
from jaxembed.data.sampling import ExampleSampler, PairSampler, TextSampler
from jaxembed.data.schema import (
    NLI_LABELS,
    Example,
    Row,
    check_document,
    check_label,
    check_pair,
    check_text,
    find_label_drops,
    find_pair_drops,
    list_fields,
    read_label,
)
from jaxembed.data.scored_pairs import SCORED_PAIR_SCHEMA, GradedPairSampler, ScoredPairSampler, make_scored_pair_schema
from jaxembed.data.shuffle import make_key, permute_indices
from jaxembed.errors import UserError

ROW_SCHEMAS = {
    schema.name: schema
    for schema in (
        RowSchema("pairs", check_pair, lambda row: len(row["pos"]), find_pair_drops),
        SCORED_PAIR_SCHEMA,
        RowSchema("labels", check_label, read_label, find_label_drops),
        NLI_SCHEMA,
        RowSchema("text", check_text),
        RowSchema("chat", check_chat),
        RowSchema("documents", check_document),  # only for checks; `make_document_schema` has the index value for a source
    )
}
# The fields that identify each schema. The first match wins.
IDENTIFYING_FIELDS = {
    "pairs": {"query", "pos"}, "scored_pairs": {"sentence1", "score"}, "labels": {"text", "label"},
    "nli": {"premise", "hypothesis", "label"}, "chat": {"messages"}, "text": {"text"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """An open source of a config.

    Attributes:
        config: The source's section of the config.
        name: Name for logs and prompts.
        sampler: Draws examples from the rows.
        in_batch: Whether other documents of a batch are negatives of its queries, and its documents are negatives of theirs.
        digest: SHA-256 of the content.
        format: Name of the row schema, or beir.
        row_count: The number of rows in the data, used or not.
    """

    config: SourceConfig
    name: str
    sampler: ExampleSampler
    in_batch: bool
    digest: str
    format: str
    row_count: int

    def __len__(self) -> int:
        return min(len(self.sampler), self.config.max_examples or MAX_INTEGER)

    @property
    def is_mineable(self) -> bool:
        """Whether negatives can be mined for it: pairs, scored pairs above `min_score`, and pairs of documents.

        Labels define their own negatives, all pairs with scores are used for training, and a chat has no documents to search.
        """
        return isinstance(self.sampler, PairSampler | ScoredPairSampler | DocumentSampler)

    def iter_pairs(self, seed: int = 0, max_texts: int | None = None) -> Iterator[Row]:
        """Yield every used example as rows of pairs, in order (see `ExampleSampler.iter_pairs`)."""
        return (row for _, row in self.iter_numbered_pairs(seed, max_texts))

    def iter_numbered_pairs(self, seed: int = 0, max_texts: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yield the number of every used example with each of its rows of pairs."""
        for number in range(len(self)):
            for row in self.sampler.iter_pairs(self._to_sampler_index(number), seed, max_texts):
                yield number, row

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw an example with its instructions and in-context examples.

        Args:
            index: Index of the example, below `len(self)`.
            rng: The only source of randomness: the same state gives the same example.
            max_negatives: Maximum number of hard negatives.
        """
        example = self.sampler.draw(self._to_sampler_index(index), rng, max_negatives)
        choices = self.config.instructions
        instruction = example.instruction or (choices[rng.integers(len(choices))] if choices else "")
        return dataclasses.replace(
            example,
            instruction=instruction,
            document_instruction=self.config.get_document_instruction(instruction),
            few_shot=self._draw_few_shot_examples(index, example.query, instruction, rng),
        )

    def read_row(self, index: int) -> Row:
        """Return the row of an example, for objectives that predict tokens. Only sources of texts and chats have one."""
        assert isinstance(self.sampler, TextSampler)
        return self.sampler.rows[self._to_sampler_index(index)]

    def _to_sampler_index(self, index: int) -> int:
        """Return the sampler's index of an example.

        With `max_examples` it is a pseudorandom one, which depends only on the content of the source.
        """
        if len(self) == len(self.sampler):
            return index
        return int(permute_indices(np.array([index]), len(self.sampler), make_key(self.digest))[0])

    def _draw_few_shot_examples(
        self, index: int, query: str, instruction: str, rng: np.random.Generator
    ) -> tuple[FewShotExample, ...]:
        """Draw in-context examples from other rows, with queries other than `query`. There may be fewer than the drawn number.

        Each has its row's own instruction, if any, otherwise the query's.
        """
        few_shot = self.config.few_shot
        if few_shot is None or rng.random() < few_shot.zero_shot:
            return ()
        count = int(rng.integers(1, few_shot.most + 1))
        # More candidates than needed: some may be this row, or have the same query.
        candidates = rng.choice(len(self), min(len(self), 2 * count + 1), replace=False)
        others = (self.sampler.draw(self._to_sampler_index(int(i)), rng, 0) for i in candidates if i != index)
        few_shot_examples = (
            FewShotExample(other.instruction or instruction, other.query, other.positive)
            for other in others
            if other.is_positive and normalize_text(other.query) != normalize_text(query)
        )
        return tuple(islice(few_shot_examples, count))


def open_sources(config: DataConfig, cache: Path) -> list[Source]:
    """Open and check every source of a config.

    Raises:
        UserError: Names file and line of the first bad row.
    """
    return _share_label_texts([open_source(source, cache) for source in config.sources])


def _share_label_texts(sources: list[Source]) -> list[Source]:
    """Let sources with `label_negatives: all` draw negatives from the label texts of all sources."""
    samplers = {i: source.sampler for i, source in enumerate(sources) if isinstance(source.sampler, LabelSampler)}
    label_texts = [text for sampler in samplers.values() for text in sampler.label_texts]
    return [
        dataclasses.replace(source, sampler=samplers[i].add_negative_labels(label_texts))
        if i in samplers and source.config.label_negatives == "all"
        else source
        for i, source in enumerate(sources)
    ]


def open_source(config: SourceConfig, cache: Path) -> Source:
    """Open and check one source.

    Raises:
        UserError: Names file and line of the first bad row.
    """
    format_name, rows = open_rows(config, cache)
    sampler: ExampleSampler
    if isinstance(rows, BeirPairRows | NliPairRows):
        sampler = PairSampler(rows, rows.max_positives, rows.drop_counts)
    elif format_name == "labels":
        sampler = LabelSampler(rows, config)
    elif format_name == "scored_pairs":
        sampler = GradedPairSampler(rows, config) if config.graded else ScoredPairSampler(rows, config)
    elif format_name == "documents":
        sampler = DocumentSampler(rows, config)
    elif format_name == "text":
        sampler = TextSampler(rows, rows.drop_counts)
    elif format_name == "chat":
        sampler = ChatSampler(rows, rows.drop_counts)
    else:
        sampler = PairSampler(rows, int(rows.max_value), rows.drop_counts)
    return Source(
        config=config,
        name=config.display_name,
        sampler=sampler,
        in_batch=format_name != "labels" if config.in_batch_negatives is None else config.in_batch_negatives,
        digest=rows.digest,
        format=format_name,
        row_count=rows.row_count,
    )


def open_rows(config: SourceConfig, cache: Path) -> tuple[str, IndexedRows | BeirPairRows | NliPairRows]:
    """Open and check the rows of a source. Return the format and the rows."""
    format_name, container = open_source_container(config)
    if container is None:
        return format_name, BeirPairRows(config)
    rows = IndexedRows(container, build_schema(format_name, config), cache, config.columns)
    return format_name, NliPairRows(rows) if format_name == "nli" else rows


def build_schema(format_name: str, config: SourceConfig) -> RowSchema:
    """Return the schema of a format's rows, with the filters of a source."""
    if format_name == "documents":
        return make_document_schema(config)
    return make_scored_pair_schema(config) if format_name == "scored_pairs" else add_filters(ROW_SCHEMAS[format_name], config)


def detect_format(config: SourceConfig) -> str:
    """Return the format of a source: the one in the config, or the one detected from its path or first row."""
    return open_source_container(config)[0]


def open_source_container(config: SourceConfig) -> tuple[str, Container | None]:
    """Return the format of a source and its unchecked container, which is None for a BEIR folder."""
    check_has_path(config.path)
    if config.format == "beir" or (config.format == "auto" and is_beir_folder(Path(config.path))):
        if config.columns:
            raise UserError(f"{config.path}: a BEIR folder has fixed fields. Remove `columns`.")
        return "beir", None
    container = open_container(name_split(config.path, config.split))
    if config.format != "auto":
        return config.format, container
    if config.pair_templates:
        return "documents", container
    _, where, content = next(scan_with_progress(container))
    row = rename_columns(parse_content(content, where), config.columns)
    return _detect_schema(row, where, {*config.columns}), container


def _detect_schema(row: Row, where: str, renamed_fields: Set[str]) -> str:
    """Return the name of the schema that fits a row's fields, with those that `columns` renames.

    A numeric label of (sentence1, sentence2, label) is ambiguous: 0 is entailment in NLI data, but 1 is a paraphrase in
    paraphrase data.
    """
    fields = row.keys() | renamed_fields
    matches = [name for name, identifying in IDENTIFYING_FIELDS.items() if identifying <= fields]
    if {"prompt", "response"} <= fields:
        matches.append("chat")
    if matches or "query" in fields:
        return next(iter(matches), "pairs")
    if {"sentence1", "sentence2", "label"} <= fields:
        if isinstance(label := row.get("label"), str) and label in NLI_LABELS:
            return "nli"
        raise UserError(
            f"{where}: ambiguous label of sentence1 and sentence2 (expected entailment, neutral or contradiction). If 0 is "
            "entailment, 1 neutral and 2 contradiction, set the source's format to nli."
        )
    raise UserError(
        f"{where}: unknown format (the row has {list_fields(row)}; expected query and pos, text and label, "
        "sentence1, sentence2 and score, premise, hypothesis and label, messages, or text). "
        "Map the fields with the source's columns, or make pairs of other fields with pair_templates."
    )
