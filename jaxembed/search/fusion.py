"""Reciprocal rank fusion of several rankings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RANK_OFFSET = 60  # the constant k of Cormack et al.


def fuse_rankings(rankings: Sequence[np.ndarray], rank_offset: int = RANK_OFFSET) -> np.ndarray:
    """Fuse rankings of documents (Cormack, Clarke and Büttcher 2009): each document gets the sum of 1 / (rank_offset + rank).

    Args:
        rankings: Documents by id, best first, one array per ranking. A document may be missing in some.
        rank_offset: The constant k of the paper, which is added to every rank.

    Returns:
        All documents, best first. Ties are ordered by first appearance in the rankings.
    """
    documents = np.concatenate(rankings)
    points = np.concatenate([1 / (rank_offset + np.arange(1, len(ranking) + 1)) for ranking in rankings])
    ids, first, inverse = np.unique(documents, return_index=True, return_inverse=True)
    sums = np.bincount(inverse, points, len(ids))
    return ids[np.lexsort((first, -sums.round(12)))]
