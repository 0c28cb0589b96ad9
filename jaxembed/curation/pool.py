"""The texts that mining reads: queries of a source, their positives, and a corpus. Each text is stored once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxembed.config import SourceConfig
from jaxembed.data.batch import EncoderInput
from jaxembed.data.beir import join_title_and_text, open_corpus
from jaxembed.data.containers import is_beir_folder, open_container
from jaxembed.data.equality import hash_exact_text, normalize_text
from jaxembed.data.rows import IndexedRows, RowSchema
from jaxembed.data.sampling import iter_rows
from jaxembed.data.schema import Row, check_passage, is_text
from jaxembed.data.sources import Source, detect_format, open_source
from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError


class PoolRow(NamedTuple):
    """A row of the input as ids of its query and documents. `draw_seed` seeds the random draws for the row."""

    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    draw_seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MiningPool:
    """Rows with their queries and documents. Equal texts (`data.equality`) are one text.

    Attributes:
        rows: Rows of the source.
        queries: Queries by id.
        documents: Documents by id. The first `corpus_size` of them are searched.
        corpus_size: Number of documents in the corpus.
        excluded_documents: For each query, the documents that are never its negatives: the positives of all rows with the
            same query text, and the query text itself.
        num_blank_documents: Number of corpus documents without text, which are left out.
        drop_counts: Number of rows that the source leaves out, by reason.
    """

    rows: list[PoolRow]
    queries: list[EncoderInput]
    documents: list[str]
    corpus_size: int
    excluded_documents: list[set[int]]
    num_blank_documents: int
    drop_counts: dict[str, int]

    @property
    def max_candidates(self) -> int:
        """The largest number of corpus documents that may be negatives of one query."""
        return self.corpus_size - min(sum(document < self.corpus_size for document in ids) for ids in self.excluded_documents)


class TextIds:
    """Ids of texts, in order of first appearance. Equal texts (`data.equality`) have one id."""

    def __init__(self) -> None:
        """Start without texts."""
        self.texts: list[str] = []
        self._ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> int:
        """Return the id of a text. A new text gets a new id."""
        text_id = self._ids.setdefault(normalize_text(text), len(self.texts))
        if text_id == len(self.texts):
            self.texts.append(text)
        return text_id

    def find(self, text: str) -> int | None:
        """Return the id of a text, or None if it has none."""
        return self._ids.get(normalize_text(text))


def open_mining_source(config: SourceConfig, cache: Path) -> Source:
    """Open the source of queries and positives. Raise `UserError` for rows of text and label."""
    if detect_format(config) == "labels":
        raise UserError(
            f"{config.path}: negatives of rows with text and label come from other labels (expected rows with query and "
            "pos). Name a file of pairs."
        )
    return open_source(config, cache)


def read_corpus(paths: Sequence[str], cache: Path, text_column: str = "text") -> Iterator[str]:
    """Iterate over the documents of a corpus.

    Args:
        paths: BEIR folders, or containers of rows with a text and optionally a title, which precedes the text.
        cache: Folder for the row indexes.
        text_column: Column of the text in containers.
    """
    columns = {} if text_column == "text" else {"text": text_column}
    for path in paths:
        if is_beir_folder(Path(path)):
            rows, _ = open_corpus(Path(path))
        else:
            rows = IndexedRows(open_container(path), RowSchema("passages", check_passage), cache, columns)
        yield from map(join_title_and_text, iter_rows(rows))


def read_pool(source: Source, corpus: Iterable[str] | None, seed: int) -> MiningPool:
    """Read the pool of a source and a corpus (`build_pool`)."""
    instruction = next(iter(source.config.instructions), "")
    pool = build_pool(source.iter_pairs(seed), corpus, seed, instruction)
    return dataclasses.replace(pool, drop_counts=source.sampler.drop_counts)


def build_pool(pairs: Iterable[Row], corpus: Iterable[str] | None, seed: int, default_instruction: str = "") -> MiningPool:
    """Build the pool of rows of pairs and a corpus.

    Args:
        pairs: Rows with query, positives and negatives.
        corpus: Documents to search. None: all positives and negatives of the rows.
        seed: Seed of all random draws, together with the texts of the row. The order of the rows has no effect.
        default_instruction: Instruction of queries whose row has no prompt.

    Raises:
        UserError: No document of the corpus has a text.
    """
    documents = TextIds()

    # The corpus comes first, so that the searched documents are the first ones.
    num_blank_documents = 0
    for text in corpus or ():
        if is_text(text):
            documents.add(text)
        else:
            num_blank_documents += 1
    corpus_size = len(documents)
    if corpus is not None and not corpus_size:
        raise UserError("corpus: contains no text. Name files or BEIR folders with documents.")

    # Rows by the ids of their texts.
    rows: list[PoolRow] = []
    query_ids: dict[EncoderInput, int] = {}
    positives_by_text: dict[str, set[int]] = {}
    for row in progress_bar(pairs, unit="row", desc="rows"):
        positives, negatives = (tuple(dict.fromkeys(map(documents.add, row.get(key) or ()))) for key in ("pos", "neg"))
        positives_by_text.setdefault(normalize_text(row["query"]), set()).update(positives)
        instruction = row.get("prompt") or default_instruction
        query = EncoderInput(row["query"], "query", instruction)
        draw_seed = (seed, *hash_exact_text("\n".join([instruction, row["query"], *row["pos"]])).tolist())
        rows.append(PoolRow(query_ids.setdefault(query, len(query_ids)), positives, negatives, draw_seed))

    return MiningPool(
        rows=rows,
        queries=list(query_ids),
        documents=documents.texts,
        corpus_size=len(documents) if corpus is None else corpus_size,
        excluded_documents=[
            positives_by_text[normalize_text(query.text)] | _find_ids(documents, query.text) for query in query_ids
        ],
        num_blank_documents=num_blank_documents,
        drop_counts={},
    )


def _find_ids(documents: TextIds, text: str) -> set[int]:
    text_id = documents.find(text)
    return set() if text_id is None else {text_id}
