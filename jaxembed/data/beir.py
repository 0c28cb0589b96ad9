"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv. For training and for evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from jaxembed.data.containers import open_container
from jaxembed.data.jsonl import write_lines
from jaxembed.data.rows import Rows, RowSchema
from jaxembed.data.schema import Row, check_corpus, check_query, is_text
from jaxembed.errors import UserError
from jaxembed.files import read_text

HEADER = ["query-id", "corpus-id", "score"]  # the first line of qrels, which may do without


@dataclasses.dataclass(frozen=True)
class BeirFolder:
    """Corpus, queries that have relevant documents, and for each of those {corpus row: grade}.

    `digest` is a SHA-256 of all three files.
    """

    corpus: Rows
    queries: Rows
    query_rows: list[int]
    relevant: list[dict[int, int]]
    digest: str

    def query(self, i: int) -> str:
        return str(self.queries[self.query_rows[i]]["text"])

    def document(self, row: int) -> str:
        return document_text(self.corpus[row])


def document_text(entry: Row) -> str:
    """Title and text of a document, joined as BEIR and MTEB join them."""
    return f"{entry.get('title') or ''} {entry['text']}".strip()


def open_corpus(folder: Path) -> tuple[Rows, dict[str, int]]:
    """The documents of a folder and the row of each id; `UserError` names what is off."""
    corpus = Rows(open_container(str(folder / "corpus.jsonl")), RowSchema("corpus", check_corpus))
    return corpus, _row_of_id(corpus)


def open_beir(folder: Path, splits: tuple[str, ...]) -> BeirFolder:
    """Opens a folder with the first of `splits` that it has. `UserError` names file and line of what is off."""
    corpus, corpus_rows = open_corpus(folder)
    queries = Rows(open_container(str(folder / "queries.jsonl")), RowSchema("queries", check_query))
    qrels = next((p for s in splits if (p := folder / "qrels" / f"{s}.tsv").is_file()), None)
    if qrels is None:
        raise UserError(f"{folder}: expected qrels/{splits[0]}.tsv beside corpus.jsonl and queries.jsonl")
    query_rows = _row_of_id(queries)
    relevant: dict[int, dict[int, int]] = {}
    text = read_text(qrels)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or (number == 1 and _fields(line) == HEADER):
            continue
        query, document, grade = _judgement(line, f"{qrels}:{number}")
        for name, rows, of in ((query, query_rows, queries), (document, corpus_rows, corpus)):
            if name not in rows:
                raise UserError(f"{qrels}:{number}: id {name!r} is not in {of.container.name}")
        if grade > 0:
            relevant.setdefault(query_rows[query], {})[corpus_rows[document]] = grade
    if not relevant:
        raise UserError(f"{qrels}: no query has a relevant document; expected scores above 0")
    digest = hashlib.sha256((corpus.digest + queries.digest + text).encode()).hexdigest()
    return BeirFolder(corpus, queries, list(relevant), list(relevant.values()), digest)


def _fields(line: str) -> list[str]:
    return line.rstrip("\r").split("\t")


def _judgement(line: str, where: str) -> tuple[str, str, int]:
    try:
        query, document, grade = _fields(line)
        return query, document, int(float(grade))
    except (ValueError, OverflowError):
        raise UserError(f"{where}: expected {', '.join(HEADER)} between tabs, found {line[:60]!r}") from None


def _row_of_id(rows: Rows) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i in range(len(rows)):
        name = rows[i]["_id"]
        if name in ids:
            places = [where for _, where, _ in islice(rows.container.scan(), i + 1)]
            raise UserError(f"{places[i]}: _id {name!r} is that of {places[ids[name]]} too; ids must be unique")
        ids[name] = i
    return ids


def write_beir(
    folder: Path,
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    relevant: Mapping[str, Mapping[str, int]],
    split: str = "test",
) -> None:
    """Writes a new folder: texts by id, without titles, and the grade of each query's relevant documents."""
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in corpus.items()])
    write_lines(folder / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    judged = [f"{q}\t{name}\t{grade}" for q, documents in relevant.items() for name, grade in documents.items()]
    lines = ["\t".join(HEADER), *judged]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


class BeirPairs:
    """A BEIR folder as training rows: each query that has relevant documents, with those as positives.

    A document without a text is none of them, and a query that has no other is dropped.
    """

    def __init__(self, folder: Path):
        beir = self._beir = open_beir(folder, ("train", "dev", "test"))
        self.digest, self.row_count = beir.digest, len(beir.relevant)
        with_text = [[row for row in sorted(rows) if is_text(beir.document(row))] for rows in beir.relevant]
        self._relevant = {i: rows for i, rows in enumerate(with_text) if rows}
        self._queries = list(self._relevant)
        if not self._queries:
            raise UserError(f"{folder}: no query has a relevant document with a text")
        self.most_positives = max(map(len, self._relevant.values()))
        self.dropped = {"queries without a document that has a text": self.row_count - len(self)}

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        query = self._queries[index]
        return {"query": self._beir.query(query), "pos": [self._beir.document(row) for row in self._relevant[query]]}
