"""The held-out sets of a config: opened once, scored during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxembed.config import EvalSetConfig, PythonPackagesConfig
from jaxembed.data.beir import open_beir
from jaxembed.data.containers import open_container
from jaxembed.data.rows import Rows
from jaxembed.data.sampling import iter_rows
from jaxembed.data.sources import SHAPES, packages_folder
from jaxembed.errors import UserError
from jaxembed.evaluation.retrieval import Encode, ndcg, recall, spearman
from jaxembed.files import exists
from jaxembed.search import bm25
from jaxembed.search.nearest import search

TOP = 10


class HeldOut(Protocol):
    """A set that scores an encoder; `metric` is its main score's name."""

    @property
    def config(self) -> EvalSetConfig: ...
    @property
    def metric(self) -> str: ...
    def score(self, encode: Encode) -> dict[str, float]: ...


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Queries, a corpus, and which documents answer which query."""

    config: EvalSetConfig
    queries: Sequence[str]
    corpus: Sequence[str]
    relevant: Sequence[dict[int, int]]
    metric: str = "ndcg_at_10"

    def score(self, encode: Encode) -> dict[str, float]:
        """nDCG@10 and recall@10, each from 0 to 1."""
        queries = encode(self.queries, self.config.instruction)
        documents = encode(self.corpus, self.config.document_instruction)
        return self._scores(search(queries, documents, TOP).rows)

    def score_bm25(self) -> dict[str, float]:
        """The same of BM25, which needs no training: the baseline to beat."""
        return self._scores(bm25.rank(self.corpus, self.queries, TOP))

    def _scores(self, ranked: np.ndarray) -> dict[str, float]:
        return {"ndcg_at_10": ndcg(self.relevant, ranked), "recall_at_10": recall(self.relevant, ranked)}


@dataclasses.dataclass(frozen=True)
class SimilaritySet:
    """Sentence pairs with graded similarity."""

    config: EvalSetConfig
    first: Sequence[str]
    second: Sequence[str]
    scores: np.ndarray
    metric: str = "spearman"

    def score(self, encode: Encode) -> dict[str, float]:
        """Spearman's correlation, from -1 to 1."""
        a, b = (encode(texts, self.config.instruction) for texts in (self.first, self.second))
        return {"spearman": spearman(a, b, self.scores)}


def open_sets(configs: Sequence[EvalSetConfig], packages: PythonPackagesConfig, cache: Path) -> list[HeldOut]:
    """Opens and checks every held-out set of a config."""
    sets: list[HeldOut] = []
    for config in configs:
        path = Path(config.path)
        if config.path.startswith("python_packages:"):
            path = packages_folder(packages, cache) / config.path.removeprefix("python_packages:")
        if config.kind == "sts":
            sets.append(_similarity(config, Rows(open_container(str(path)), SHAPES["scored_pairs"], cache)))
        elif exists(path):
            sets.append(_retrieval(config, path))
        else:
            raise UserError(f"eval.sets: {config.name}: {config.path}: no such file or folder")
    return sets


def _retrieval(config: EvalSetConfig, path: Path) -> RetrievalSet:
    beir = open_beir(path, ("test", "dev", "train"))
    queries = [beir.query(i) for i in range(len(beir.query_rows))]
    return RetrievalSet(config, queries, [beir.document(row) for row in range(len(beir.corpus))], beir.relevant)


def _similarity(config: EvalSetConfig, rows: Rows) -> SimilaritySet:
    first, second = zip(*((row["sentence1"], row["sentence2"]) for row in iter_rows(rows)), strict=True)
    return SimilaritySet(config, first, second, np.array(rows.numbers))


def score_all(sets: Sequence[HeldOut], encode: Encode) -> dict[str, float]:
    """The scores of every set, by SET/METRIC."""
    return {f"{s.config.name}/{name}": value for s in sets for name, value in s.score(encode).items()}
