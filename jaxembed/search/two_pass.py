"""Find the exact nearest documents on CPUs in two passes: scores in bfloat16 find candidates, scores in float32 order them.

The dot product of two vectors q and d that are rounded to q' and d' differs from the exact one by at most

    |q - q'| |d| + |q'| |d - d'|

(Cauchy-Schwarz), and by the rounding of its sum. Let e bound the errors of all scores of a query, and let t be its k-th best
approximate score. The exact scores of the k best documents are at least t - e, so their approximate ones are at least t - 2 e.
All documents above that are candidates. A query with too many candidates is left to another search.

Subtracting one vector from all documents does not change their order. Their mean is subtracted, because shorter vectors have
smaller rounding errors.

`jaxembed.devices.cpu` documents the switch that turns this off.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32

from jaxembed.devices.bfloat16 import has_fast_matmuls
from jaxembed.devices.processes import progress_bar
from jaxembed.search.candidates import CANDIDATE_GROUP_SIZE, CandidatePool, get_capacity

MIN_SEARCH_FLOPS = 1 << 36  # a smaller search takes less time than the compilation
MAX_QUERIES_PER_TILE, MAX_DOCUMENTS_PER_TILE = 512, 4096  # the scores of a tile should fit into a CPU's caches
MIN_QUERIES_PER_TILE, MIN_DOCUMENTS_PER_TILE = 64, 512  # smaller tiles are not worthwhile
BYTES_PER_SCORE = 24  # with the copies that `np.partition` makes for the first block
MAX_TILES_PER_PASS = 16  # tiles of queries that share a block of documents, which is rounded once for them
SAMPLE_DOCUMENTS = 4096  # documents whose mean is subtracted from all
SUM_ERROR = 2.0**-22  # error of float32 sums and of the subtraction per dimension, relative to the norms, rounded up generously
NORM_SLACK = 1.01  # for the rounding of norms and bounds
UNDERFLOW = 2.0**-63  # float32 may flush the squares of smaller numbers to zero


class TileSizes(NamedTuple):
    """How a search is divided.

    Attributes:
        queries: Queries per tile.
        documents: Documents per tile.
        tiles: Tiles of queries that share a block of documents.
        threads: Tiles at once.
    """

    queries: int
    documents: int
    tiles: int
    threads: int


class RoundedVectors(NamedTuple):
    """Vectors in bfloat16.

    Attributes:
        values: The vectors.
        norms: Upper bounds of their norms in float32.
        errors: Upper bounds of the norms of the rounding errors.
    """

    values: BFloat16[Array, "n d"]
    norms: Float32[Array, " n"]
    errors: Float32[Array, " n"]


def is_worthwhile(queries: np.ndarray, documents: np.ndarray) -> bool:
    """Return whether two passes take less time than one: for a large search, on a CPU with fast bfloat16."""
    flops = 2 * len(queries) * documents.size
    return flops >= MIN_SEARCH_FLOPS and len(queries) >= MIN_QUERIES_PER_TILE and has_fast_matmuls()


def choose_tile_sizes(memory_mb: int, width: int, k: int, num_queries: int) -> TileSizes | None:
    """Return the largest useful sizes that fit into memory, or None if the memory is too small for two passes.

    A quarter of the memory is for a block of documents, half is for scores, and a quarter for candidates.

    Args:
        memory_mb: Memory of the search in MiB.
        width: Width of the vectors.
        k: Documents to find per query.
        num_queries: Number of all queries.
    """
    quarter, threads = memory_mb * 2**18, os.cpu_count() or 1
    documents = min(MAX_DOCUMENTS_PER_TILE, quarter // (20 * width) // CANDIDATE_GROUP_SIZE * CANDIDATE_GROUP_SIZE)
    if documents < MIN_DOCUMENTS_PER_TILE:
        return None
    queries = min(MAX_QUERIES_PER_TILE, 2 * quarter // (BYTES_PER_SCORE * threads * documents))
    if queries < MIN_QUERIES_PER_TILE:
        return None
    queries = min(queries, num_queries)
    bytes_per_query = 16 * get_capacity(k) + 8 * width
    tiles = min(MAX_TILES_PER_PASS, quarter // (queries * bytes_per_query))
    return TileSizes(queries, documents, tiles, threads) if tiles else None


def search_in_two_passes(
    queries: Float[np.ndarray, "q d"],
    documents: Float[np.ndarray, "n d"],
    k: int,
    sizes: TileSizes,
    show_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the k documents nearest to each query by dot product.

    Args:
        queries: Query vectors, at least one tile.
        documents: Document vectors, at least k.
        k: Documents per query.
        sizes: How the search is divided.
        show_progress: Show a progress bar.

    Returns:
        - Rows of the documents, int32 [Q, k], and scores, float32 [Q, k]. Ties are ordered by row.
        - Indices of the queries that need another search: too many documents have nearly the same score, or numbers are not
          finite.
    """
    rows, scores = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
    is_unsure = np.zeros(len(queries), bool)
    step = sizes.queries * sizes.tiles
    first_queries, first_rows = range(0, len(queries), step), range(0, len(documents), sizes.documents)
    with (
        np.errstate(invalid="ignore", over="ignore"),  # numbers that are not finite make a query unsure
        jax.set_mesh(None),  # a caller may have set a mesh of several devices
        ThreadPoolExecutor(sizes.threads, initializer=_ignore_infinities) as threads,
        progress_bar(total=len(first_queries) * len(first_rows), unit="block", desc="search", disable=not show_progress) as bar,
    ):
        corpus = _Corpus(documents, sizes.documents)
        for first_query in first_queries:
            starts = np.arange(first_query, min(first_query + step, len(queries)), sizes.queries)
            # The last tile overlaps the one before, so that all have the same size.
            parts = [slice(start, start + sizes.queries) for start in np.minimum(starts, len(queries) - sizes.queries)]
            tiles = [_QueryTile(queries[part], corpus, k) for part in parts]
            for first_row in first_rows:
                block = corpus.round_block(first_row)
                end_row = min(first_row + sizes.documents, len(documents))
                for task in [threads.submit(tile.add_block, block, first_row, end_row) for tile in tiles]:
                    task.result()
                bar.update()
            rankings = [threads.submit(tile.rank, documents, k) for tile in tiles]
            for part, ranking in zip(parts, rankings, strict=True):
                rows[part], scores[part], is_unsure[part] = ranking.result()
    return rows, scores, np.flatnonzero(is_unsure)


def _ignore_infinities() -> None:
    """Let a thread compute with numbers that are not finite. It does not inherit this from the thread that starts it."""
    np.seterr(invalid="ignore", over="ignore")


class _Corpus:
    """The documents, minus a mean, in blocks of one size."""

    def __init__(self, documents: np.ndarray, block_size: int):
        self._documents, self._block_size = documents, block_size
        self._mean = documents[:: max(1, len(documents) // SAMPLE_DOCUMENTS)].mean(axis=0, dtype=np.float32)
        blocks = (_round_vectors(self._read(row), self._mean) for row in range(0, len(documents), block_size))
        self._max_norm, self._max_error = np.max([(block.norms.max(), block.errors.max()) for block in blocks], axis=0)

    def _read(self, first_row: int) -> np.ndarray:
        block = np.asarray(self._documents[first_row : first_row + self._block_size], np.float32)
        return np.pad(block, ((0, self._block_size - len(block)), (0, 0)))

    def round_block(self, first_row: int) -> Array:
        """Return the vectors of a block."""
        return _round_vectors(self._read(first_row), self._mean).values

    def compute_margins(self, queries: RoundedVectors) -> np.ndarray:
        """Return twice the largest error of a score of each query, float32 [Q]. It is not finite if a score may not be."""
        norms, errors = np.asarray(queries.norms), np.asarray(queries.errors)
        rounding = errors * self._max_norm + (norms + errors) * self._max_error
        # The norms of the documents themselves are at most those without the mean, plus the norm of the mean.
        sums = norms * (self._max_norm + 2 * np.linalg.norm(self._mean))
        return 2 * NORM_SLACK * (rounding + SUM_ERROR * len(self._mean) * sums)


class _QueryTile:
    """Queries that are scored at once, and their candidates."""

    def __init__(self, queries: np.ndarray, corpus: _Corpus, k: int):
        self._queries = np.asarray(queries, np.float32)
        rounded = _round_vectors(self._queries, np.zeros(queries.shape[1], np.float32))
        self._values = rounded.values
        self._pool = CandidatePool(corpus.compute_margins(rounded), k)

    def add_block(self, documents: Array, first_row: int, end_row: int) -> None:
        """Add the candidates of a block of documents."""
        scores, maxima = map(np.asarray, _score_tile(self._values, documents))
        self._pool.add(scores, maxima, first_row, end_row)

    def rank(self, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows and scores of the best candidates, [q, k], and whether each query needs another search, [q]."""
        shape = (len(self._queries), k)
        best_rows, best_scores, is_unsure = (
            np.full(shape, -1, np.int32),
            np.full(shape, -np.inf, np.float32),
            np.ones(shape[0], bool),
        )
        for i, rows in enumerate(self._pool.finish()):
            if len(rows) >= k:
                # einsum sums each row in the same order, so that equal documents have equal scores. BLAS does not.
                scores = np.einsum("nd,d->n", np.asarray(documents[rows], np.float32), self._queries[i])
                best = np.argsort(-scores, kind="stable")[:k]
                best_rows[i], best_scores[i], is_unsure[i] = rows[best], scores[best], False
        return best_rows, best_scores, is_unsure


@jax.jit
def _round_vectors(x: Float32[Array, "n d"], mean: Float32[Array, " d"]) -> RoundedVectors:
    """Subtract a vector, and round to bfloat16."""
    x = x - mean
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may drop a conversion and its inverse
    underflow = math.sqrt(x.shape[1]) * UNDERFLOW
    norms, errors = (NORM_SLACK * jnp.sqrt(jnp.sum(v * v, axis=1)) + underflow for v in (x, x - rounded))
    return RoundedVectors(rounded.astype(jnp.bfloat16), norms, errors)


@jax.jit
def _score_tile(queries: BFloat16[Array, "q d"], documents: BFloat16[Array, "n d"]) -> tuple[Array, Array]:
    """Return the dot products [q, n] in float32, and the maximum of each `CANDIDATE_GROUP_SIZE` documents."""
    scores = jnp.einsum("qd,nd->qn", queries, documents, preferred_element_type=jnp.float32)
    return scores, scores.reshape(len(queries), -1, CANDIDATE_GROUP_SIZE).max(axis=2)
