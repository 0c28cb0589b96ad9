"""BEIR folders (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv), for training and for evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from jaxembed.config import SourceConfig
from jaxembed.data.containers import open_container
from jaxembed.data.filters import filter_row, has_filters
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.rows import IndexedRows, RowSchema
from jaxembed.data.schema import MAX_ABS_NUMBER, Row, check_beir_document, check_beir_query, is_text
from jaxembed.errors import UserError
from jaxembed.files import read_text

QRELS_HEADER = ["query-id", "corpus-id", "score"]  # the first line of qrels, which is optional
MAX_LINE_CHARS = 60  # characters of a bad line that an error quotes
NO_TEXT_REASON = "queries without a document that has a text"
MAX_LISTED_IDS = 3  # ids that a warning lists
TRAINING_SPLITS = ("train", "dev", "test")  # the first one that exists is used for training
EVALUATION_SPLITS = ("test", "dev", "train")  # the first one that exists is used for evaluation
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BeirFolder:
    """A corpus, queries, and the relevant documents of the queries that have any.

    Attributes:
        corpus: The documents.
        queries: All queries.
        query_rows: Rows of the queries that have relevant documents.
        relevant: For each of `query_rows`, {corpus row: relevance above 0}. A relevant document that the corpus lacks has a
            negative row: it counts as relevant, and no search finds it, as in trec_eval.
        digest: SHA-256 of all three files.
        split: Name of the qrels file.
    """

    corpus: IndexedRows
    queries: IndexedRows
    query_rows: list[int]
    relevant: list[dict[int, float]]
    digest: str
    split: str

    def get_query_text(self, index: int) -> str:
        """Return the text of a query, by its index in `query_rows`."""
        return str(self.queries[self.query_rows[index]]["text"])

    def get_document_text(self, row: int) -> str:
        """Return title and text of a document, by its row of the corpus."""
        return join_title_and_text(self.corpus[row])


def join_title_and_text(document: Row) -> str:
    """Join title and text of a document with a space, as BEIR and MTEB do."""
    return f"{document.get('title') or ''} {document['text']}".strip()


def open_corpus(folder: Path) -> tuple[IndexedRows, dict[str, int]]:
    """Return the documents of a BEIR folder, and id -> row.

    Raises:
        UserError: The corpus is missing or has a bad row.
    """
    corpus = IndexedRows(open_container(str(folder / "corpus.jsonl")), RowSchema("corpus", check_beir_document))
    return corpus, _map_ids_to_rows(corpus)


def open_beir(folder: Path, defaults: tuple[str, ...], split: str = "") -> BeirFolder:
    """Open a BEIR folder with one of its splits.

    Judgments of documents or queries that the folder lacks, and repeated ones that differ, are counted in warnings.

    Args:
        folder: Folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.
        defaults: Splits to choose from if none is named: the first one that the folder has.
        split: The split.

    Raises:
        UserError: A file is missing or has a bad line; the error names file and line.
    """
    # Open the documents and queries.
    corpus, corpus_rows = open_corpus(folder)
    queries = IndexedRows(open_container(str(folder / "queries.jsonl")), RowSchema("queries", check_beir_query))
    qrels = _choose_qrels(folder, defaults, split)
    query_rows = _map_ids_to_rows(queries)
    # Read the judgments. The dicts of absent ids have the line of each.
    relevant: dict[int, dict[int, float]] = {}
    absent_queries, absent_documents, conflicts = dict[str, int](), dict[str, int](), 0
    text = read_text(qrels)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or (number == 1 and _split_fields(line) == QRELS_HEADER):
            continue
        query, document, grade = _parse_judgment(line, f"{qrels}:{number}")
        if grade <= 0 and (query not in query_rows or document not in corpus_rows):
            continue  # nothing is lost
        if query not in query_rows:
            absent_queries.setdefault(query, number)
            continue
        if document not in corpus_rows:
            absent_documents[document] = number
            corpus_rows[document] = -len(absent_documents)
        grades = relevant.setdefault(query_rows[query], {})
        conflicts += grades.get(corpus_rows[document], grade) != grade
        grades[corpus_rows[document]] = grade
    _warn_of_absent(absent_documents, qrels, corpus, "they count as relevant documents that no search finds")
    _warn_of_absent(absent_queries, qrels, queries, "their judgments are left out")
    if conflicts:
        log.warning(
            "%s: %d judgments differ from an earlier one of the same query and document; the last counts", qrels, conflicts
        )
    # A score of 0 is kept until here, because it withdraws an earlier judgment.
    positive = ((row, {document: grade for document, grade in grades.items() if grade > 0}) for row, grades in relevant.items())
    relevant = {row: grades for row, grades in positive if grades}
    if not relevant:
        raise UserError(f"{qrels}: no query has a relevant document (expected scores above 0)")
    digest = hashlib.sha256((corpus.digest + queries.digest + text).encode()).hexdigest()
    return BeirFolder(corpus, queries, list(relevant), list(relevant.values()), digest, qrels.stem)


def _choose_qrels(folder: Path, defaults: tuple[str, ...], split: str) -> Path:
    """Return the qrels of a split, or of the first of `defaults` that exists. The choice is logged."""
    splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    candidates = (split,) if split else defaults
    chosen_split = next((name for name in candidates if name in splits), None)
    if chosen_split is None:
        detail = f"found {', '.join(splits)}" if splits else "expected it next to corpus.jsonl and queries.jsonl"
        advice = " Set split to one of them." if splits else ""
        raise UserError(f"{folder}: qrels/{candidates[0]}.tsv is missing ({detail}).{advice}")
    if not split:
        others = [name for name in splits if name != chosen_split]
        also = f"; also there: {', '.join(others)}. Set split to choose" if others else ""
        log.info("%s: uses qrels/%s.tsv, the first that exists of %s%s", folder, chosen_split, ", ".join(defaults), also)
    return folder / "qrels" / f"{chosen_split}.tsv"


def _warn_of_absent(absent: dict[str, int], qrels: Path, rows: IndexedRows, effect: str) -> None:
    """Warn of the ids in qrels that are not among the rows, given the line of each."""
    if absent:
        first_ids = ", ".join(f"{id_!r} (line {line})" for id_, line in islice(absent.items(), MAX_LISTED_IDS))
        more = ", ..." if len(absent) > MAX_LISTED_IDS else ""
        log.warning(
            "%s: %s ids are not in %s: %s%s; %s", qrels, f"{len(absent):,}", rows.container.name, first_ids, more, effect
        )


def _split_fields(line: str) -> list[str]:
    return line.rstrip("\r").split("\t")


def _parse_judgment(line: str, where: str) -> tuple[str, str, float]:
    """Return query id, document id and relevance of a line of qrels. The relevance may be a fraction."""
    try:
        query, document, text = _split_fields(line)
        grade = float(text)
        if not abs(grade) < MAX_ABS_NUMBER:
            raise ValueError
        return query, document, int(grade) if grade.is_integer() else grade
    except ValueError:
        raise UserError(
            f"{where}: expected {', '.join(QRELS_HEADER)} separated by tabs (found {line[:MAX_LINE_CHARS]!r})"
        ) from None


def _map_ids_to_rows(rows: IndexedRows) -> dict[str, int]:
    id_rows: dict[str, int] = {}
    for i in range(len(rows)):
        id_ = rows[i]["_id"]
        if id_ in id_rows:
            raise UserError(f"{rows.locate(i)}: duplicate _id {id_!r} (first in {rows.locate(id_rows[id_])})")
        id_rows[id_] = i
    return id_rows


def write_beir(
    folder: Path,
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    relevant: Mapping[str, Mapping[str, int]],
    split: str = "test",
) -> None:
    """Write a new BEIR folder, whose documents have no titles.

    Args:
        folder: Must not have a subfolder qrels.
        corpus: Document id -> text.
        queries: Query id -> text.
        relevant: Query id -> {document id: relevance grade}.
        split: Name of the qrels file.
    """
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": id_, "title": "", "text": text} for id_, text in corpus.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": id_, "text": text} for id_, text in queries.items()])
    judgments = [f"{query}\t{document}\t{grade}" for query, grades in relevant.items() for document, grade in grades.items()]
    lines = ["\t".join(QRELS_HEADER), *judgments]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


class BeirPairRows:
    """A BEIR folder as rows of pairs: each query that has relevant documents, with those as positives.

    A document without a text is not a positive, and a query without any positive is dropped. The filters of the source apply:
    `where` to the fields of a query, `min_chars` and `max_chars` to queries and documents.

    Attributes:
        row_count: The number of queries that have relevant documents.
        digest: SHA-256 of the three files.
        max_positives: Maximum number of positives of a query.
        drop_counts: Reason -> number of dropped queries, or of dropped positives of other queries.
    """

    def __init__(self, config: SourceConfig):
        """Open the folder of a source. The default split is the first one of train, dev and test that exists."""
        folder = Path(config.path)
        beir = self._beir = open_beir(folder, TRAINING_SPLITS, config.split)
        self.digest, self.row_count = beir.digest, len(beir.relevant)
        grades = [grade for query_grades in beir.relevant for grade in query_grades.values()]
        if any(not float(grade).is_integer() for grade in grades):
            log.warning(
                "%s: qrels/%s.tsv has fractional scores, from %g to %g; every document above 0 is trained on as a positive",
                folder, beir.split, min(grades), max(grades),
            )  # fmt: skip
        drop_counts = Counter({NO_TEXT_REASON: 0})
        self._positive_rows: dict[int, list[int]] = {}  # index of a query -> its documents with a text that pass the filters
        for index in range(self.row_count):
            positive_rows, reasons = self._select_documents(index, config)
            drop_counts.update(reasons)
            if positive_rows:
                self._positive_rows[index] = positive_rows
        self._query_indices = list(self._positive_rows)
        if not self._query_indices:
            counts = "; ".join(f"{reason}: {count:,}" for reason, count in drop_counts.items() if count)
            raise UserError(f"{folder}: no query has a relevant document that can be used ({counts})")
        self.max_positives = max(map(len, self._positive_rows.values()))
        self.drop_counts = dict(drop_counts)

    def _select_documents(self, index: int, config: SourceConfig) -> tuple[list[int], list[str]]:
        """Return the documents of a query that can be used, and a reason for what is left out otherwise."""
        beir = self._beir
        texts = {row: text for row in sorted(beir.relevant[index]) if row >= 0 and is_text(text := beir.get_document_text(row))}
        if not texts:
            return [], [NO_TEXT_REASON]
        if not has_filters(config):
            return list(texts), []
        pair = {**beir.queries[beir.query_rows[index]], "query": beir.get_query_text(index), "pos": list(texts.values())}
        kept_pair, reasons = filter_row(pair, "pairs", config)
        return [row for row, text in texts.items() if kept_pair and text in kept_pair["pos"]], reasons

    def __len__(self) -> int:
        return len(self._query_indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        query = self._query_indices[index]
        positives = [self._beir.get_document_text(row) for row in self._positive_rows[query]]
        return {"query": self._beir.get_query_text(query), "pos": positives}
