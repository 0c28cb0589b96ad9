"""Scores of retrieval and similarity: nDCG, recall, Spearman's correlation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

Encode = Callable[[Sequence[str], str], np.ndarray]  # (texts, instruction) -> vectors [N, D]


def ndcg(relevant: Sequence[Mapping[int, float]], ranked: Int[np.ndarray, "q k"]) -> float:
    """Return the mean nDCG@k with the relevance, which may be a fraction, as gain, as in trec_eval and BEIR.

    Args:
        relevant: For each query, the relevance of each relevant document.
        ranked: Documents of each query, best first.
    """
    discounts = 1 / np.log2(np.arange(ranked.shape[1]) + 2)
    scores = []
    for grades, rows in zip(relevant, ranked, strict=True):
        gain = sum(grades.get(int(row), 0) * discount for row, discount in zip(rows, discounts, strict=True))
        ideal = sorted(grades.values(), reverse=True)[: len(discounts)]
        scores.append(gain / sum(grade * discount for grade, discount in zip(ideal, discounts, strict=False)))
    return float(np.mean(scores))


def recall(relevant: Sequence[Mapping[int, float]], ranked: Int[np.ndarray, "q k"]) -> float:
    """Return the mean recall@k: the share of a query's relevant documents that are among its first k."""
    shares = [len(grades.keys() & set(rows.tolist())) / len(grades) for grades, rows in zip(relevant, ranked, strict=True)]
    return float(np.mean(shares))


def spearman(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"], scores: Float[np.ndarray, " n"]) -> float:
    """Return Spearman's correlation of the cosines of N pairs of unit vectors with given scores."""
    from scipy import stats  # takes a second to import

    return float(stats.spearmanr(np.sum(a * b, axis=1), scores).statistic)
