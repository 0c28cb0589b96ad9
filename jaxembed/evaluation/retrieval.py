"""Retrieval metrics, one value per query: nDCG, recall, reciprocal rank, and average precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

Encode = Callable[[Sequence[str], str], np.ndarray]  # (texts, instruction) -> vectors [N, D]
RelevanceByQuery = Sequence[Mapping[int, float]]  # for each query, the relevance of each relevant document


def ndcg(relevant: RelevanceByQuery, ranked_rows: Int[np.ndarray, "q k"]) -> Float[np.ndarray, " q"]:
    """Return nDCG@k of each query. The gain is the relevance, which may be a fraction, as in trec_eval and BEIR.

    Args:
        relevant: For each query, the relevance of each relevant document.
        ranked_rows: Documents of each query, best first.
    """
    discounts = 1 / np.log2(np.arange(ranked_rows.shape[1]) + 2)
    scores = []
    for grades, rows in zip(relevant, ranked_rows, strict=True):
        gain = sum(grades.get(int(row), 0) * discount for row, discount in zip(rows, discounts, strict=True))
        ideal = sorted(grades.values(), reverse=True)[: len(discounts)]
        scores.append(gain / sum(grade * discount for grade, discount in zip(ideal, discounts, strict=False)))
    return np.array(scores)


def recall(relevant: RelevanceByQuery, ranked_rows: Int[np.ndarray, "q k"]) -> Float[np.ndarray, " q"]:
    """Return recall@k of each query: the share of its relevant documents that are among the first k."""
    return np.array([hits.sum() / len(grades) for grades, hits in zip(relevant, find_hits(relevant, ranked_rows), strict=True)])


def reciprocal_rank(relevant: RelevanceByQuery, ranked_rows: Int[np.ndarray, "q k"]) -> Float[np.ndarray, " q"]:
    """Return 1 / rank of the first relevant document of each query, 0 where none is among the first k. Its mean is MRR@k."""
    hits = find_hits(relevant, ranked_rows)
    return np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0.0)


def average_precision(relevant: RelevanceByQuery, ranked_rows: Int[np.ndarray, "q k"]) -> Float[np.ndarray, " q"]:
    """Return the average precision of each query over its first k documents, as in trec_eval. Its mean is MAP@k."""
    hits = find_hits(relevant, ranked_rows)
    precision = np.cumsum(hits, axis=1) / np.arange(1, ranked_rows.shape[1] + 1)
    return (precision * hits).sum(axis=1) / np.array([len(grades) for grades in relevant])


def find_hits(relevant: RelevanceByQuery, ranked_rows: Int[np.ndarray, "q k"]) -> np.ndarray:
    """Return where ranked documents are relevant, bool [Q, k]."""
    return np.array([np.isin(rows, list(grades)) for grades, rows in zip(relevant, ranked_rows, strict=True)])
