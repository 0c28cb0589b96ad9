"""Held-out sets of a config: opened once, scored during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxembed.config import EvalSetConfig
from jaxembed.data.beir import EVALUATION_SPLITS, open_beir
from jaxembed.data.containers import name_split, open_container
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sampling import iter_rows
from jaxembed.data.sources import ROW_SCHEMAS
from jaxembed.errors import UserError
from jaxembed.evaluation.retrieval import Encode, ndcg, recall, spearman
from jaxembed.files import exists
from jaxembed.search import bm25
from jaxembed.search.nearest import search

CUTOFF = 10  # ranks that nDCG and recall count


class HeldOutSet(Protocol):
    """A set that scores an encoder."""

    @property
    def config(self) -> EvalSetConfig:
        """The config section of the set."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the data."""
        ...

    @property
    def metric(self) -> str:
        """The name of the main score."""
        ...

    def score(self, encode: Encode) -> dict[str, float]:
        """Return the scores of an encoder by name."""
        ...


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Queries, a corpus, and which documents are relevant to which query.

    Attributes:
        config: The config section of the set.
        queries: Texts of the queries.
        corpus: Texts of the documents.
        relevant: For each query, the relevance of each relevant document by its index in the corpus. Negative indices are
            documents that the corpus lacks.
        digest: SHA-256 of the data.
        metric: Name of the main score.
    """

    config: EvalSetConfig
    queries: Sequence[str]
    corpus: Sequence[str]
    relevant: Sequence[dict[int, float]]
    digest: str = ""
    metric: str = "ndcg_at_10"

    def score(self, encode: Encode) -> dict[str, float]:
        """Return nDCG@10 and recall@10, each from 0 to 1."""
        queries = encode(self.queries, self.config.instruction)
        documents = encode(self.corpus, self.config.document_instruction)
        return self._scores(search(queries, documents, CUTOFF).rows)

    def score_bm25(self) -> dict[str, float]:
        """Return the same scores for BM25, the baseline without training."""
        return self._scores(bm25.rank_documents(self.corpus, self.queries, CUTOFF))

    def _scores(self, ranked: np.ndarray) -> dict[str, float]:
        return {"ndcg_at_10": ndcg(self.relevant, ranked), "recall_at_10": recall(self.relevant, ranked)}


@dataclasses.dataclass(frozen=True)
class SimilaritySet:
    """Sentence pairs with graded similarity.

    Attributes:
        config: The config section of the set.
        first: First sentence of each pair.
        second: Second sentence of each pair.
        scores: Similarity of each pair, float64 [N].
        digest: SHA-256 of the data.
        metric: Name of the main score.
    """

    config: EvalSetConfig
    first: Sequence[str]
    second: Sequence[str]
    scores: np.ndarray
    digest: str = ""
    metric: str = "spearman"

    def score(self, encode: Encode) -> dict[str, float]:
        """Return Spearman's correlation, from -1 to 1."""
        a, b = (encode(texts, self.config.instruction) for texts in (self.first, self.second))
        return {"spearman": spearman(a, b, self.scores)}


def open_held_out_sets(configs: Sequence[EvalSetConfig], cache: Path) -> list[HeldOutSet]:
    """Open and check every held-out set of a config.

    Raises:
        UserError: If a set does not exist or is malformed.
    """
    sets: list[HeldOutSet] = []
    for config in configs:
        if config.kind == "sts":
            sets.append(_read_similarity_set(config, cache))
        elif exists(Path(config.path)):
            sets.append(_read_retrieval_set(config))
        else:
            raise UserError(f"eval.sets: {config.name}: no such file or folder {config.path!r}")
    return sets


def _read_retrieval_set(config: EvalSetConfig) -> RetrievalSet:
    beir = open_beir(Path(config.path), EVALUATION_SPLITS, config.split)
    queries = [beir.query_text(i) for i in range(len(beir.query_rows))]
    corpus = [beir.document_text(row) for row in range(len(beir.corpus))]
    return RetrievalSet(config, queries, corpus, beir.relevant, beir.digest)


def _read_similarity_set(config: EvalSetConfig, cache: Path) -> SimilaritySet:
    rows = IndexedRows(open_container(name_split(config.path, config.split)), ROW_SCHEMAS["scored_pairs"], cache)
    first, second = zip(*((row["sentence1"], row["sentence2"]) for row in iter_rows(rows)), strict=True)
    return SimilaritySet(config, first, second, np.array(rows.index_values), rows.digest)


def score_sets(sets: Sequence[HeldOutSet], encode: Encode) -> dict[str, float]:
    """Return the scores of every set by SET/METRIC."""
    return {f"{s.config.name}/{name}": value for s in sets for name, value in s.score(encode).items()}
