"""The nearest documents: equal to a whole sort, whatever the blocks, in the memory that was named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import parallel
from jaxembed.search import nearest
from jaxembed.search.nearest import GROUP, block_sizes, search, top_k


def sorted_whole(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(
    ("queries", "documents", "k"), [(2100, 50, 7), (130, 1500, 3), (5, 1000, 40), (3, 8, 20), (1, 1, 1)], ids=str
)
def test_search_is_exact_across_blocks(queries: int, documents: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole numbers, so that many scores are equal: of those the first documents come first. All may be below zero."""
    monkeypatch.setattr(nearest, "MOST_DOCUMENTS", 200)
    monkeypatch.setattr(nearest, "MOST_QUERIES", 32)
    random = np.random.default_rng(1)
    a, b = (random.integers(-3, 4, (count, 8)).astype(np.float32) for count in (queries, documents))
    for negative in (b, -10 - abs(b)):
        found, asked = search(abs(a) + 1, negative, k), abs(a) + 1
        expected = sorted_whole(asked, negative, k)
        np.testing.assert_array_equal(found.rows, expected)
        np.testing.assert_array_equal(found.scores, np.take_along_axis(asked @ negative.T, expected, axis=1))
        assert found.rows.shape == (queries, min(k, documents))


def test_the_best_of_groups_are_the_best_of_all() -> None:
    """Also where equal scores stand in more groups than are looked into."""
    random = np.random.default_rng(0)
    shape = (20, 20 * GROUP + 5)
    scores = jnp.asarray(
        np.concatenate([random.normal(size=shape), random.integers(0, 3, shape), np.zeros(shape)]), jnp.float32
    )
    for k in (1, 5, 19):
        ours, theirs = (jax.jit(best, static_argnums=1)(scores, k) for best in (top_k, jax.lax.top_k))
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_no_queries_and_an_approximate_search() -> None:
    random = np.random.default_rng(2)
    queries, documents = random.normal(size=(40, 8)).astype(np.float32), random.normal(size=(3000, 8)).astype(np.float32)
    assert search(queries[:0], documents, 5).rows.shape == (0, 5)
    with jax.set_mesh(parallel.make_mesh(2)):  # as in training on a part of the devices
        np.testing.assert_array_equal(search(queries, documents, 5).rows, sorted_whole(queries, documents, 5))
    found = search(queries, documents, 5, approximate=True).rows
    assert np.mean([np.isin(a, b).mean() for a, b in zip(sorted_whole(queries, documents, 5), found, strict=True)]) > 0.9


@pytest.mark.parametrize(("memory_mb", "width", "k"), [(8, 64, 10), (64, 384, 100), (64, 4096, 1000), (512, 1024, 100)])
def test_a_block_fits_in_the_memory(memory_mb: int, width: int, k: int) -> None:
    """By the compiler's own count of everything the program holds."""
    mesh = parallel.make_mesh(1)
    blocks = block_sizes(memory_mb, width, k, 10**6, 10**6)
    shapes = [((blocks.queries, k), np.int32), ((blocks.queries, k), np.float32)]
    shapes += [((blocks.queries, blocks.documents), np.float32), ((), np.int32)]
    rows, scores, *others = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    memory = nearest._merge(mesh, False).lower((rows, scores), *others).compile().memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += 4 * blocks.documents * width  # the documents, beside which the next scores are made
    assert memory_mb / 4 < held / 2**20 < memory_mb
