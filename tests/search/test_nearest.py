"""Nearest documents: equal to a full sort for any block sizes, within the given memory."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.devices.mesh import make_mesh
from jaxembed.search import nearest, two_pass
from jaxembed.search.nearest import GROUP_SIZE, choose_block_sizes, choose_faiss_batch_size, search, top_k
from jaxembed.search.two_pass import choose_tile_sizes


@pytest.fixture(params=["faiss", "mesh", "two passes"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Search by FAISS or in two passes, as on CPUs, or on the mesh."""
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(nearest, "_can_use_faiss", lambda: False)
    monkeypatch.setattr(nearest, "is_worthwhile", lambda queries, documents: request.param == "two passes" and len(queries) > 0)
    return str(request.param)


def sort_all(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """Return the rows of the k best documents by a stable sort of all scores."""
    return np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(
    ("queries", "documents", "k"), [(2100, 50, 7), (130, 1500, 3), (5, 1000, 40), (3, 8, 20), (1, 1, 1)], ids=str
)
def test_search_is_exact_across_blocks(
    queries: int, documents: int, k: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are integers, so that many scores are equal. Scores may also be all negative, or all the same."""
    monkeypatch.setattr(nearest, "MAX_DOCUMENTS_PER_BLOCK", 200)
    for limit in ("MAX_QUERIES_PER_BLOCK", "MAX_FAISS_QUERIES"):
        monkeypatch.setattr(nearest, limit, 32)
    monkeypatch.setattr(two_pass, "MAX_QUERIES_PER_TILE", 64)
    monkeypatch.setattr(two_pass, "MAX_DOCUMENTS_PER_TILE", 512)
    random = np.random.default_rng(1)
    a, b = (random.integers(-3, 4, (count, 8)).astype(np.float32) for count in (queries, documents))
    a = abs(a) + 1
    for vectors in (b, -10 - abs(b), np.zeros_like(b)):
        found, expected = search(a, vectors, k), sort_all(a, vectors, k)
        np.testing.assert_array_equal(found.indices, expected)
        np.testing.assert_array_equal(found.scores, np.take_along_axis(a @ vectors.T, expected, axis=1))
        assert found.indices.shape == (queries, min(k, documents))
        assert (found.indices.dtype, found.scores.dtype) == (np.int32, np.float32)


def test_top_k_equals_that_of_jax() -> None:
    """This also holds if equal scores are in more groups than are searched."""
    random = np.random.default_rng(0)
    shape = (20, 20 * GROUP_SIZE + 5)
    scores = jnp.asarray(
        np.concatenate([random.normal(size=shape), random.integers(0, 3, shape), np.zeros(shape)]), jnp.float32
    )
    for k in (1, 5, 19):
        ours, theirs = (jax.jit(select, static_argnums=1)(scores, k) for select in (top_k, jax.lax.top_k))
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_no_queries_no_documents_and_approximate_search(backend: str) -> None:
    random = np.random.default_rng(2)
    queries, documents = random.normal(size=(40, 8)).astype(np.float32), random.normal(size=(3000, 8)).astype(np.float32)
    assert search(queries[:0], documents, 5).indices.shape == (0, 5)
    assert search(queries, documents[:0], 5).indices.shape == (40, 0)
    with jax.set_mesh(make_mesh(2)):  # as in training on some of the devices
        np.testing.assert_array_equal(search(queries, documents, 5).indices, sort_all(queries, documents, 5))
    found = search(queries, documents, 5, approximate=True).indices
    assert np.mean([np.isin(a, b).mean() for a, b in zip(sort_all(queries, documents, 5), found, strict=True)]) > 0.9


@pytest.mark.parametrize(("memory_mb", "width", "k"), [(8, 64, 10), (64, 384, 100), (64, 4096, 1000), (512, 1024, 100)])
def test_block_fits_into_memory(memory_mb: int, width: int, k: int) -> None:
    """Measured by the compiler's count of everything that the program allocates."""
    mesh = make_mesh(1)
    blocks = choose_block_sizes(memory_mb, width, k, 10**6, 10**6)
    shapes = [((blocks.queries, k), np.int32), ((blocks.queries, k), np.float32)]
    shapes += [((blocks.queries, width), np.float32), ((blocks.documents, width), np.float32), ((), np.int32)]
    rows, scores, *others = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    memory = nearest._compile_merge_block(mesh, False).lower((rows, scores), *others).compile().memory_analysis()
    allocated = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory_mb / 4 < allocated / 2**20 < memory_mb


SEARCH = """
import sys
import numpy as np
from jaxembed.search import nearest
from jaxembed.search.nearest import search

def peak():  # MiB; getrusage would start at the peak of the parent process
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

memory_mb, k, has_two_passes = map(int, sys.argv[1:])
nearest.is_worthwhile = lambda queries, documents: has_two_passes
queries, documents = (np.random.default_rng(seed).standard_normal((n, 8), np.float32) for seed, n in enumerate((6000, 20000)))
search(queries[:100], documents, 10, memory_mb=memory_mb)  # loads the libraries
before = peak()
search(queries, documents, k, memory_mb=memory_mb)
print(peak() - before - len(queries) * k * 8 / 2**20)
"""


def test_faiss_calls_fit_into_memory() -> None:
    pytest.importorskip("faiss")
    assert choose_faiss_batch_size(16, 1000) < choose_faiss_batch_size(512, 1000) == nearest.MAX_FAISS_QUERIES
    assert choose_faiss_batch_size(1, 10**6) == 1
    assert 1 < measure_memory(16, 1000, has_two_passes=False) < 16


def test_two_passes_fit_into_memory() -> None:
    assert choose_tile_sizes(1, 8, 10, 6000) is None
    assert choose_tile_sizes(512, 384, 10**6, 6000) is None
    assert 1 < measure_memory(160, 300, has_two_passes=True) < 160  # with the compilation


def measure_memory(memory_mb: int, k: int, has_two_passes: bool) -> float:
    """Return the growth of a process's memory in a search, without the result, in MiB."""
    arguments = [str(int(argument)) for argument in (memory_mb, k, has_two_passes)]
    done = subprocess.run([sys.executable, "-c", SEARCH, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)
