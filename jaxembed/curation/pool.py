"""What negatives are mined for and from: the queries of a source, their positives, and a corpus, each text once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxembed.config import PythonPackagesConfig, SourceConfig
from jaxembed.data.batch import RawText
from jaxembed.data.beir import document_text, open_corpus
from jaxembed.data.containers import is_beir, open_container
from jaxembed.data.rows import Rows, RowSchema
from jaxembed.data.sampling import iter_rows
from jaxembed.data.schema import check_passage, is_text, text_hash
from jaxembed.data.sources import Source, detect_format, open_source
from jaxembed.devices.processes import progress
from jaxembed.errors import UserError


class Row(NamedTuple):
    """A row of the input, by the numbers of its query and documents. `draw` seeds what is drawn for it."""

    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    draw: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pool:
    """Rows with their queries and positives; the corpus is the first `searched` of `documents`.

    Texts that differ only in the white space around them are one. `known` are, for each query, the documents that are never
    its negatives: the positives of every row with that text, and the text itself. `blank` counts the documents of the corpus
    without a text, `dropped` what the source leaves out, by the reason.
    """

    rows: list[Row]
    queries: list[RawText]
    documents: list[str]
    searched: int
    known: list[set[int]]
    blank: int
    dropped: dict[str, int]

    @property
    def candidates(self) -> int:
        """The most documents of the corpus that may be negatives of one query."""
        return self.searched - min(sum(number < self.searched for number in known) for known in self.known)


class TextIds:
    """Numbers of texts, in the order of their first coming."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.number: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        number = self.number.setdefault(text.strip(), len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number


def open_input(config: SourceConfig, packages: PythonPackagesConfig, cache: Path) -> Source:
    """The source of the rows: any format but (text, label)."""
    if detect_format(config) == "labels":
        raise UserError(f"{config.path}: rows of text and label draw their negatives by label; name rows of query and pos")
    return open_source(config, packages, cache)


def read_corpus(paths: Sequence[str], cache: Path, text_column: str = "text") -> Iterator[str]:
    """The documents of BEIR folders, and of any container of rows with a text, and perhaps "title" before it."""
    columns = {} if text_column == "text" else {"text": text_column}
    for path in paths:
        if is_beir(Path(path)):
            rows, _ = open_corpus(Path(path))
        else:
            rows = Rows(open_container(path), RowSchema("passages", check_passage), cache, columns)
        yield from map(document_text, iter_rows(rows))


def read_pool(source: Source, corpus: Iterable[str] | None, seed: int) -> Pool:
    """The pool of a source and a corpus; without one, all positives and negatives of the source are the corpus.

    `UserError` where the corpus has no document with a text.
    """
    documents, queries, blank = TextIds(), dict[RawText, int](), 0
    for text in corpus or ():
        if is_text(text):
            documents(text)
        else:
            blank += 1
    searched = len(documents.texts)
    if corpus is not None and not searched:
        raise UserError("--corpus: holds no text; name files or BEIR folders with documents")
    rows, positives = [], dict[str, set[int]]()
    for row in progress(source.as_pairs(seed), unit="row", desc="rows"):
        found, others = (tuple(dict.fromkeys(map(documents, row.get(name, ())))) for name in ("pos", "neg"))
        positives.setdefault(row["query"].strip(), set()).update(found)
        instruction = row.get("prompt") or next(iter(source.config.instructions), "")
        query = RawText(row["query"], "query", instruction)
        draw = (seed, *text_hash("\n".join([instruction, row["query"], *row["pos"]])).tolist())
        rows.append(Row(queries.setdefault(query, len(queries)), found, others, draw))
    known = [positives[query.text.strip()] | _own(query.text, documents) for query in queries]
    searched = len(documents.texts) if corpus is None else searched
    return Pool(rows, list(queries), documents.texts, searched, known, blank, source.sampler.dropped)


def _own(text: str, documents: TextIds) -> set[int]:
    number = documents.number.get(text.strip())
    return set() if number is None else {number}
