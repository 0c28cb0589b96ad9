"""Search in two passes: equal to a full sort of float32 scores, and candidates are chosen by a true bound of the error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.search import nearest, two_pass
from jaxembed.search.candidates import CandidatePool
from jaxembed.search.nearest import search
from jaxembed.search.two_pass import TileSizes, search_in_two_passes

SIZES = TileSizes(queries=64, documents=128, tiles=2, threads=2)


def draw_vectors(seed: int, count: int, width: int) -> np.ndarray:
    """Draw vectors of different norms around a common direction. Some are zero, and many occur more than once."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, width)) + random.uniform(-2, 2) * random.standard_normal(width)
    vectors *= 10 ** random.uniform(-1, 1, (count, 1)) * 10 ** random.uniform(-6, 6)
    vectors[random.random(count) < 0.02] = 0
    return vectors[random.integers(0, count, count)].astype(np.float32)


def sort_by_score(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and scores of the k best documents by a stable sort of float32 scores. Equal documents have equal scores."""
    scores = np.stack([np.einsum("nd,d->n", documents, query) for query in queries])
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, axis=1)


@given(
    seed=st.integers(0, 10**6), count=st.sampled_from([40, 128, 1000, 1500]), width=st.sampled_from([1, 3, 64, 100]),
    k=st.sampled_from([1, 5, 40]),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_result_is_that_of_a_full_sort(seed: int, count: int, width: int, k: int) -> None:
    queries, documents = draw_vectors(seed, 70, width), draw_vectors(seed + 1, count, width)
    rows, scores, unsure = search_in_two_passes(queries, documents, k, SIZES)
    sure = np.setdiff1d(np.arange(len(queries)), unsure)
    expected_rows, expected_scores = sort_by_score(queries[sure], documents, k)
    np.testing.assert_array_equal(rows[sure], expected_rows)
    np.testing.assert_array_equal(scores[sure], expected_scores)
    if width >= 64:  # with few dimensions, many documents may have nearly the same score
        assert len(sure) > len(queries) / 2


def test_margin_is_needed_and_bounds_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for vectors that point into similar directions, where only the deviation from the mean counts."""
    for offset in (0.0, 1.0):
        random = np.random.default_rng(0)
        queries, documents = (random.standard_normal((n, 64)).astype(np.float32) + np.float32(offset) for n in (64, 4096))
        corpus = two_pass._Corpus(documents, 128)
        rounded = two_pass._round_vectors(queries, np.zeros(64, np.float32))
        approximate = np.concatenate(
            [np.asarray(two_pass._score_tile(rounded.values, corpus.round_block(row))[0]) for row in range(0, 4096, 128)],
            axis=1,
        )
        exact = queries.astype(np.float64) @ (documents.astype(np.float64) - corpus._mean).T
        errors, bounds = abs(approximate - exact).max(axis=1), corpus.compute_margins(rounded) / 2
        assert (errors < bounds).all()
        assert (bounds < 20 * errors).all()
        margins = corpus.compute_margins
        monkeypatch.setattr(two_pass._Corpus, "compute_margins", lambda self, queries: 0 * margins(queries))  # noqa: B023
        rows, _, _ = search_in_two_passes(queries, documents, 40, SIZES)
        assert not np.array_equal(rows, sort_by_score(queries, documents, 40)[0])
        monkeypatch.undo()
        rows, _, unsure = search_in_two_passes(queries, documents, 40, SIZES)
        assert not len(unsure)
        np.testing.assert_array_equal(rows, sort_by_score(queries, documents, 40)[0])


def test_queries_with_too_many_candidates_or_infinite_numbers_are_searched_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    queries, documents = (random.standard_normal((n, 16)).astype(np.float32) for n in (64, 2000))
    queries[3], queries[5], queries[7] = 0, np.nan, 1e38
    _, _, unsure = search_in_two_passes(queries, documents, 5, SIZES)
    np.testing.assert_array_equal(unsure, [3, 5, 7])
    documents[9, 2] = np.inf
    assert len(search_in_two_passes(queries, documents, 5, SIZES)[2]) == 64
    # Half the documents are equal. They are the best ones for every second query.
    documents = np.concatenate([documents[1000:], np.tile(4 * random.standard_normal(16), (1000, 1))]).astype(np.float32)
    queries = np.abs(queries[8:]) * np.sign(documents[-1])
    queries[::2] *= -1
    _, _, unsure = search_in_two_passes(queries, documents, 5, SIZES._replace(queries=56))
    np.testing.assert_array_equal(unsure, np.arange(1, 56, 2))
    monkeypatch.setattr(nearest, "is_worthwhile", lambda queries, documents: True)
    expected_rows, expected_scores = sort_by_score(queries, documents, 5)
    result = search(queries, documents, 5)
    np.testing.assert_array_equal(result.indices[1::2], np.tile(np.arange(1000, 1005), (28, 1)))
    np.testing.assert_array_equal(result.indices[::2], expected_rows[::2])
    np.testing.assert_allclose(result.scores, expected_scores, rtol=1e-5)


def test_bound_rises_while_documents_pass() -> None:
    """Few documents of a block are candidates once many have passed."""
    random = np.random.default_rng(0)
    pool = CandidatePool(np.full(8, 0.01, np.float32), 10)
    all_scores = random.standard_normal((8, 320 * 64)).astype(np.float32)
    for first in range(0, all_scores.shape[1], 320):
        scores = np.ascontiguousarray(all_scores[:, first : first + 320])
        pool.add(scores, scores.reshape(8, -1, 32).max(2), first, first + 320)
    kth_scores = np.sort(all_scores, axis=1)[:, -10]
    for query, rows in enumerate(pool.finish()):
        np.testing.assert_array_equal(rows, np.flatnonzero(all_scores[query] >= pool.bounds[query]))
    np.testing.assert_allclose(pool.bounds, kth_scores - 0.01, atol=1e-6)
