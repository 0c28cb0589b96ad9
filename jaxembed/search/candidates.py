"""Keep the documents whose approximate scores may put them among the k best of a query."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

CANDIDATE_GROUP_SIZE = 32  # documents of a group, which is skipped if its best score is below the bound
MIN_SPARE_CANDIDATES = 256  # beside CANDIDATES_PER_RESULT * k
CANDIDATES_PER_RESULT = 4


def get_capacity(k: int) -> int:
    """Return the maximum number of candidates of a query."""
    return CANDIDATES_PER_RESULT * k + MIN_SPARE_CANDIDATES


class CandidatePool:
    """The candidates of Q queries.

    A document is a candidate if its score is at most `margin` below the k-th best score of its query so far. So the bound of a
    query rises as more documents are scored.

    Attributes:
        bounds: Lowest score of a candidate, float32 [Q]. Infinite for a query with more candidates than fit.
    """

    def __init__(self, margins: Float[np.ndarray, " q"], k: int):
        """Start without candidates.

        Args:
            margins: How far below the k-th best score a candidate may be.
            k: Documents to find per query.
        """
        self._margins, self._k = margins, k
        shape = (len(margins), get_capacity(k))
        self._scores, self._rows = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
        self._counts = np.zeros(len(margins), np.int64)
        self.bounds = np.full(len(margins), -np.inf, np.float32)

    def add(self, scores: Float[np.ndarray, "q n"], maxima: Float[np.ndarray, "q g"], first_row: int, end_row: int) -> None:
        """Add the candidates among a block of documents.

        Args:
            scores: Scores of the documents.
            maxima: The best score of each `CANDIDATE_GROUP_SIZE` documents.
            first_row: Row of the first document.
            end_row: The row after the last document. The columns after it are padding.
        """
        if first_row == 0:
            self._set_first_bounds(scores[:, :end_row], maxima[:, : end_row // CANDIDATE_GROUP_SIZE])
        # Find the groups with a candidate, and then the candidates.
        groups = np.flatnonzero(maxima >= self.bounds[:, None])
        owners = groups // maxima.shape[1]
        members = scores.reshape(-1, CANDIDATE_GROUP_SIZE)[groups]
        hits = np.flatnonzero(members >= self.bounds[owners, None])
        owners, values = owners[hits // CANDIDATE_GROUP_SIZE], members.ravel()[hits]
        rows = (
            first_row
            + groups[hits // CANDIDATE_GROUP_SIZE] % maxima.shape[1] * CANDIDATE_GROUP_SIZE
            + hits % CANDIDATE_GROUP_SIZE
        )
        is_valid = rows < end_row
        self._append(owners[is_valid], values[is_valid], rows[is_valid])

    def finish(self) -> list[Int[np.ndarray, " c"]]:
        """Return the rows of the candidates of each query, in ascending order."""
        self._prune(np.arange(len(self._counts)))
        return [np.sort(rows[:count]) for rows, count in zip(self._rows, self._counts.tolist(), strict=True)]

    def _set_first_bounds(self, scores: np.ndarray, maxima: np.ndarray) -> None:
        """Set bounds from the first block. The k-th best group maximum is a lower, valid bound, found faster."""
        values = maxima if maxima.shape[1] >= CANDIDATES_PER_RESULT * self._k else scores
        if values.shape[1] >= self._k:
            self.bounds = np.partition(values, -self._k, axis=1)[:, -self._k] - self._margins

    def _append(self, owners: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
        """Append candidates, given the query of each in ascending order."""
        # If they do not fit, raise the bounds. If that does not suffice, give up.
        for make_room in (self._prune, self._give_up):
            crowded = np.flatnonzero(self._counts + np.bincount(owners, minlength=len(self._counts)) > self._scores.shape[1])
            if not len(crowded):
                break
            make_room(crowded)
            is_candidate = scores >= self.bounds[owners]
            owners, scores, rows = owners[is_candidate], scores[is_candidate], rows[is_candidate]
        self._write(owners, scores, rows)

    def _prune(self, queries: np.ndarray) -> None:
        """Raise the bounds of some queries, and drop the documents below them."""
        scores, rows = self._scores[queries], self._rows[queries]
        kth_scores = np.partition(scores, -self._k, axis=1)[:, -self._k]
        self.bounds[queries] = np.maximum(self.bounds[queries], kth_scores - self._margins[queries])
        is_candidate = (scores >= self.bounds[queries, None]) & (rows >= 0)
        self._clear(queries)
        self._write(queries[np.nonzero(is_candidate)[0]], scores[is_candidate], rows[is_candidate])

    def _give_up(self, queries: np.ndarray) -> None:
        self.bounds[queries] = np.inf
        self._clear(queries)

    def _clear(self, queries: np.ndarray) -> None:
        self._scores[queries], self._rows[queries], self._counts[queries] = -np.inf, -1, 0

    def _write(self, owners: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
        """Write candidates after those of each query, given the query of each in ascending order."""
        num_new = np.bincount(owners, minlength=len(self._counts))
        first_slots = self._counts - (np.cumsum(num_new) - num_new)
        slots = np.arange(len(owners)) + first_slots[owners]
        self._scores[owners, slots], self._rows[owners, slots] = scores, rows
        self._counts += num_new
