"""Reciprocal rank fusion of several rankings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FUSION_K = 60  # the constant k of Cormack et al.


def fuse_rankings(rankings: Sequence[np.ndarray], fusion_k: int = FUSION_K) -> np.ndarray:
    """Fuse rankings of documents (Cormack, Clarke and Büttcher 2009): the score of a document is the sum of 1 / (k + rank).

    Args:
        rankings: For each ranking, the ids of its documents, best first. A ranking may lack some documents.
        fusion_k: The constant k of the paper, which is added to every rank.

    Returns:
        The ids of all documents, best first. Ties are ordered by first appearance in the rankings.
    """
    all_ids = np.concatenate(rankings)
    terms = np.concatenate([1 / (fusion_k + np.arange(1, len(ranking) + 1)) for ranking in rankings])
    ids, first_positions, inverse = np.unique(all_ids, return_index=True, return_inverse=True)
    scores = np.bincount(inverse, terms, len(ids)).round(12)  # so that sums of equal terms in another order are ties
    return ids[np.lexsort((first_positions, -scores))]
