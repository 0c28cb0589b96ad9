"""The nearest documents: equal to a whole sort, whatever the blocks, in the memory that was named."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.devices.mesh import make_mesh
from jaxembed.search import nearest
from jaxembed.search.nearest import GROUP, block_sizes, faiss_queries, search, top_k


@pytest.fixture(params=["faiss", "mesh"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a search is made: as on a CPU with FAISS, or as elsewhere."""
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(nearest, "_faiss", lambda: None)
    return str(request.param)


def sorted_whole(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(
    ("queries", "documents", "k"), [(2100, 50, 7), (130, 1500, 3), (5, 1000, 40), (3, 8, 20), (1, 1, 1)], ids=str
)
def test_search_is_exact_across_blocks(queries: int, documents: int, k: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole numbers, so that many scores are equal: of those the first documents come first. All may be below zero, or the
    same.
    """
    monkeypatch.setattr(nearest, "MOST_DOCUMENTS", 200)
    for most in ("MOST_QUERIES", "FAISS_QUERIES"):
        monkeypatch.setattr(nearest, most, 32)
    random = np.random.default_rng(1)
    a, b = (random.integers(-3, 4, (count, 8)).astype(np.float32) for count in (queries, documents))
    a = abs(a) + 1
    for these in (b, -10 - abs(b), np.zeros_like(b)):
        found, expected = search(a, these, k), sorted_whole(a, these, k)
        np.testing.assert_array_equal(found.rows, expected)
        np.testing.assert_array_equal(found.scores, np.take_along_axis(a @ these.T, expected, axis=1))
        assert found.rows.shape == (queries, min(k, documents))
        assert (found.rows.dtype, found.scores.dtype) == (np.int32, np.float32)


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


def test_no_queries_no_documents_and_an_approximate_search(way: str) -> None:
    random = np.random.default_rng(2)
    queries, documents = random.normal(size=(40, 8)).astype(np.float32), random.normal(size=(3000, 8)).astype(np.float32)
    assert search(queries[:0], documents, 5).rows.shape == (0, 5)
    assert search(queries, documents[:0], 5).rows.shape == (40, 0)
    with jax.set_mesh(make_mesh(2)):  # as in training on a part of the devices
        np.testing.assert_array_equal(search(queries, documents, 5).rows, sorted_whole(queries, documents, 5))
    found = search(queries, documents, 5, approximate=True).rows
    assert np.mean([np.isin(a, b).mean() for a, b in zip(sorted_whole(queries, documents, 5), found, strict=True)]) > 0.9


@pytest.mark.parametrize(("memory_mb", "width", "k"), [(8, 64, 10), (64, 384, 100), (64, 4096, 1000), (512, 1024, 100)])
def test_a_block_fits_in_the_memory(memory_mb: int, width: int, k: int) -> None:
    """By the compiler's own count of everything the program holds."""
    mesh = make_mesh(1)
    blocks = block_sizes(memory_mb, width, k, 10**6, 10**6)
    shapes = [((blocks.queries, k), np.int32), ((blocks.queries, k), np.float32)]
    shapes += [((blocks.queries, width), np.float32), ((blocks.documents, width), np.float32), ((), np.int32)]
    rows, scores, *others = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    memory = nearest._merge(mesh, False).lower((rows, scores), *others).compile().memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory_mb / 4 < held / 2**20 < memory_mb


SEARCH = """
import sys
import numpy as np
from jaxembed.search.nearest import search

def peak():  # MiB; what getrusage says begins with the peak of the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

memory_mb, k = map(int, sys.argv[1:])
queries, documents = (np.random.default_rng(0).standard_normal((n, 8), np.float32) for n in (6000, 20000))
search(queries[:100], documents, 10, memory_mb=memory_mb)  # loads the libraries
held = peak()
search(queries, documents, k, memory_mb=memory_mb)
print(peak() - held - len(queries) * k * 8 / 2**20)
"""


def test_faiss_is_asked_for_what_fits_in_the_memory() -> None:
    """By the growth of a process's memory, less what is returned."""
    pytest.importorskip("faiss")
    assert faiss_queries(16, 1000) < faiss_queries(512, 1000) == nearest.FAISS_QUERIES
    assert faiss_queries(1, 10**6) == 1
    done = subprocess.run([sys.executable, "-c", SEARCH, "16", "1000"], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 16
