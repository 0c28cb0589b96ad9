"""Tasks of AIR-Bench, read from local copies of its data sets.

A copy is a folder as the hub has it: `TASK_DOMAIN_LANGUAGE/VERSION/NAME/`, such as qa_wiki_en/AIR-Bench_24.05/default, with
corpus.jsonl and SPLIT_queries.jsonl (rows of id and text). Judgments are next to it, in
`qrels-TASK_DOMAIN_LANGUAGE-SPLIT/VERSION/NAME/SPLIT_qrels.jsonl` (rows of qid, docid and relevance).

The judgments of the test split are not public. For such splits the results of the search are written in AIR-Bench's format, for
its leaderboard.

QA is scored by nDCG@10, long documents by recall@10 (NV-Embed, appendix A).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from jaxembed.config.fields import quote_value
from jaxembed.data.columns import parse_content
from jaxembed.data.jsonl import JsonLinesFile
from jaxembed.data.schema import MAX_ABS_NUMBER
from jaxembed.errors import UserError
from jaxembed.evaluation.bootstrap import ScoredItems, score_mean
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.retrieval import ndcg, recall
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import EvaluationTask, GroupMember
from jaxembed.files import compute_file_digest, exists, write_json

DATA_SET_NAME = re.compile(r"(qa|long-doc)_([a-z]+)_([a-z]+)")
AIR_BENCH_CUTOFF, SUBMITTED_DOCUMENTS = 10, 1000  # k of nDCG@k and recall@k; documents per query in a submission
DEFAULT_INSTRUCTION = "Given a question, retrieve passages that answer the question"
GROUP_TITLES = {"qa": "AIR-Bench QA", "long-doc": "AIR-Bench long documents"}
METRICS = {"qa": "ndcg_at_10", "long-doc": "recall_at_10"}


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that name data sets of AIR-Bench."""
    parser.add_argument(
        "--air-bench", nargs="+", default=[], metavar="DIR",
        help="folders with data sets of AIR-Bench, as its hub has them: DIR/qa_wiki_en/AIR-Bench_24.05/default",
    )  # fmt: skip


def open_tasks(args: argparse.Namespace) -> list[AirBenchTask]:
    """Return the tasks in the folders that the options name.

    Raises:
        UserError: A folder holds no data set of AIR-Bench, or nothing that can be scored or written.
    """
    results_folder = Path(args.out) / "air-bench" if args.out else None
    return [task for folder in args.air_bench for task in _find_tasks(Path(folder), results_folder)]


def lacks_judgments(task: EvaluationTask) -> TypeGuard[AirBenchTask]:
    """Return whether a task is a split of AIR-Bench without judgments: its search results are written instead of a score."""
    return isinstance(task, AirBenchTask) and task.qrels is None


def omit_results(tasks: Sequence[EvaluationTask]) -> list[EvaluationTask]:
    """Return the tasks for the model of --compare: its results of the search would replace those of MODEL."""
    return [dataclasses.replace(task, results_folder=None) if lacks_judgments(task) else task for task in tasks]


def _find_tasks(folder: Path, results_folder: Path | None) -> list[AirBenchTask]:
    """Return a task for each split with queries, if it has judgments or its search results can be written."""
    corpora = sorted(path for path in folder.glob("*/AIR-Bench_*/*/corpus.jsonl") if DATA_SET_NAME.fullmatch(path.parts[-4]))
    if not corpora:
        raise UserError(
            f"{folder}: no data set of AIR-Bench (expected {folder}/qa_wiki_en/AIR-Bench_24.05/default/corpus.jsonl)"
        )
    tasks = []
    for corpus in corpora:
        data_set, version, name = corpus.parts[-4:-1]
        for queries in sorted(corpus.parent.glob("*_queries.jsonl")):
            split = queries.name.removesuffix("_queries.jsonl")
            qrels = folder / f"qrels-{data_set}-{split}" / version / name / f"{split}_qrels.jsonl"
            if exists(qrels) or results_folder:
                tasks.append(AirBenchTask(corpus, queries, qrels if exists(qrels) else None, results_folder))
    if not tasks:
        raise UserError(
            f"{folder}: no split has judgments (expected {folder}/qrels-qa_wiki_en-dev or similar). Add --out DIR to write the "
            "results of the search for AIR-Bench's leaderboard."
        )
    return tasks


@dataclasses.dataclass(frozen=True)
class AirBenchTask:
    """A split of a data set of AIR-Bench.

    Attributes:
        corpus: File of the documents.
        queries: File of the queries.
        qrels: File of the judgments. None: they are not public.
        results_folder: Folder for the results of the search. None: they are not written.
    """

    corpus: Path
    queries: Path
    qrels: Path | None
    results_folder: Path | None

    @property
    def name(self) -> str:
        """Name of the task, such as AIR-Bench_24.05/qa_wiki_en/default/dev."""
        data_set, version, name = self.corpus.parts[-4:-1]
        return f"{version}/{data_set}/{name}/{self.split}"

    @property
    def type(self) -> str:
        """Type of such tasks in MTEB."""
        return "Retrieval"

    @property
    def split(self) -> str:
        """The split of the queries."""
        return self.queries.name.removesuffix("_queries.jsonl")

    @property
    def groups(self) -> tuple[GroupMember, ...]:
        """The table of QA or of long documents, with one column per domain."""
        return (GroupMember(GROUP_TITLES[self._kind], self._domain),)

    @property
    def expected_texts(self) -> int:
        """Number of queries and documents."""
        return len(self._queries_by_id) + len(self._documents_by_id)

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of the files. Empty without judgments: the results of the search are written again."""
        if self.qrels is None:
            return ""
        digests = [compute_file_digest(path) for path in (self.corpus, self.queries, self.qrels)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def list_texts(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield the role and the texts of all inputs that are scored."""
        yield "queries", list(self._queries_by_id.values())
        yield "documents", list(self._documents_by_id.values())

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores of a model, as `score_items` does."""
        return self.score_items(encoder).summary

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with those of the queries.

        Without judgments the score is None, its metric is empty, and the results of the search are written.
        """
        prompts = encoder.prompts.choose(self.name, self.type, DEFAULT_INSTRUCTION)
        queries = encoder.encode(list(self._queries_by_id.values()), prompts.query)
        documents = encoder.encode(list(self._documents_by_id.values()), prompts.document)
        vectors = [(encoder.convert(queries, version), encoder.convert(documents, version)) for version in encoder.versions]
        query_scores: list[np.ndarray | None] = [None] * len(vectors)  # of each version of the vectors
        if self.qrels is not None:
            query_scores = [self._score_vectors(*pair, self.qrels) for pair in vectors]
        elif self.results_folder is not None:
            self._write_results(*vectors[0], encoder.name)
        scores = [None if values is None else float(np.mean(values)) for values in query_scores]
        score, values = scores[0], query_scores[0]
        summary: dict[str, Any] = {
            "score": score,
            "metric": METRICS[self._kind] if self.qrels else "",
            "type": self.type,
            "instruction": prompts.instruction,
            "subsets": {"default": score},
            "splits": {self.split: score},
        } | encoder.summarize_versions(scores)
        if values is None:
            return ItemScores(summary, missing_reason="its judgments are not public")
        return ItemScores(summary, [ScoredItems(values[:, None], score_mean, "queries")])

    def _score_vectors(self, queries: np.ndarray, documents: np.ndarray, qrels: Path) -> np.ndarray:
        """Return the score of each query that has judgments, [Q]."""
        from jaxembed.search.nearest import search  # imports JAX

        result = search(queries, documents, AIR_BENCH_CUTOFF)
        rows = {id_: row for row, id_ in enumerate(self._documents_by_id)}
        relevance_by_query = _read_qrels(qrels, rows)
        query_rows = [i for i, id_ in enumerate(self._queries_by_id) if id_ in relevance_by_query]
        relevant = [relevance_by_query[id_] for id_ in self._queries_by_id if id_ in relevance_by_query]
        if not query_rows:
            raise UserError(f"{qrels}: judges none of the queries in {self.queries}. Use files of the same version.")
        metric = ndcg if METRICS[self._kind].startswith("ndcg") else recall
        return metric(relevant, result.indices[query_rows])

    def _write_results(self, queries: np.ndarray, documents: np.ndarray, model: str) -> None:
        """Write a file for AIR-Bench's leaderboard: the top documents of each query with their scores."""
        assert self.results_folder is not None
        from jaxembed.search.nearest import search  # imports JAX

        result = search(queries, documents, SUBMITTED_DOCUMENTS)
        _, version, name = self.corpus.parts[-4:-1]
        ids = list(self._documents_by_id)
        search_results = {
            query: {ids[row]: float(score) for row, score in zip(query_rows, query_scores, strict=True)}
            for query, query_rows, query_scores in zip(self._queries_by_id, result.indices.tolist(), result.scores, strict=True)
        }
        content = {
            "model_name": model, "reranker_name": "NoReranker", "benchmark_version": version, "task_type": self._kind,
            "domain": self._domain, "language": self._language, "dataset_name": name, "split": self.split,
            "search_results": search_results,
        }  # fmt: skip
        folder = self.results_folder / model / "NoReranker" / self._kind / self._domain
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self._language}_{name}_{self.split}.json", content)

    @cached_property
    def _documents_by_id(self) -> dict[str, str]:
        return _read_texts(self.corpus)

    @cached_property
    def _queries_by_id(self) -> dict[str, str]:
        return _read_texts(self.queries)

    @property
    def _name_parts(self) -> Sequence[str]:
        """Task (qa or long-doc), domain and language: the parts of the name of the data set."""
        match = DATA_SET_NAME.fullmatch(self.corpus.parts[-4])
        assert match is not None
        return match.groups()

    @property
    def _kind(self) -> str:
        return self._name_parts[0]

    @property
    def _domain(self) -> str:
        return self._name_parts[1]

    @property
    def _language(self) -> str:
        return self._name_parts[2]


def _read_texts(path: Path) -> dict[str, str]:
    """Return the texts of a JSONL file by id. Raises `UserError` if there are none."""
    texts = {row["id"]: row["text"] for _, row in _read_rows(path, ("id", "text"))}
    if not texts:
        raise UserError(f"{path}: has no rows (expected rows of id and text)")
    return texts


def _read_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place and the content of every row of a JSONL file. Raises `UserError` if a field is not a string."""
    for _, where, content in JsonLinesFile(path).scan():
        row = parse_content(content, where)
        if wrong := next((field for field in fields if not isinstance(row.get(field), str)), None):
            raise UserError(f'{where}: no string field "{wrong}" (expected {", ".join(fields)})')
        yield where, row


def _read_qrels(qrels: Path, rows: Mapping[str, int]) -> dict[str, dict[int, float]]:
    """Return the relevance of each query's relevant documents, by corpus row. Documents that are absent have negative rows."""
    relevant: dict[str, dict[int, float]] = {}
    num_absent = 0
    for where, row in _read_rows(qrels, ("qid", "docid")):
        grade = row.get("relevance", 1)
        if not isinstance(grade, int | float) or not abs(grade) < MAX_ABS_NUMBER:
            raise UserError(f"{where}: the relevance is {quote_value(grade)} (expected a number)")
        if grade > 0:
            num_absent += row["docid"] not in rows
            relevant.setdefault(row["qid"], {})[rows.get(row["docid"], -num_absent)] = float(grade)
    if not relevant:
        raise UserError(f"{qrels}: no query has a relevant document (expected a relevance above 0)")
    return relevant
