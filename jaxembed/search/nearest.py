"""Exact nearest documents by dot product, block by block on the mesh: no score matrix is ever whole."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxembed import parallel
from jaxembed.parallel import BATCH_AXES
from jaxembed.processes import progress

GROUP = 32  # documents whose best score stands for them
MOST_QUERIES, MOST_DOCUMENTS = 512, 131072  # of a block; larger ones are no faster
MEMORY_MB = 512


Best = tuple[jax.Array, jax.Array]  # rows and scores [q, k]


class Found(NamedTuple):
    """Rows of documents and their scores, best first: of a query [k], or of several [Q, k]."""

    rows: np.ndarray
    scores: np.ndarray


class Blocks(NamedTuple):
    """How many queries, on each device, meet how many documents at a time."""

    queries: int
    documents: int


def search(
    queries: Float[np.ndarray, "q d"],
    documents: Float[np.ndarray, "n d"],
    k: int,
    *,
    memory_mb: int = MEMORY_MB,
    approximate: bool = False,
    show_progress: bool = False,
) -> Found:
    """The k documents nearest to each query by dot product, int32 and float32 [Q, min(k, N)].

    Of equal scores the document that comes first is first. Queries are split over all devices; a block of documents at a
    time is on each, and the best of a query so far are merged with the block's. `memory_mb` is what that takes on a device,
    beside the vectors and what is returned. `approximate` asks `jax.lax.approx_max_k` for a block's best, which is faster
    on TPUs and finds nearly all.
    """
    mesh = parallel.make_mesh()
    k = min(k, len(documents))
    blocks = block_sizes(memory_mb, queries.shape[1], k, len(queries), len(documents))
    at_once = blocks.queries * parallel.shard_count(mesh)
    starts = range(0, len(queries), at_once)
    best = [parallel.put_whole(parallel.split_batch(mesh), _none(at_once, k)) for _ in starts]
    merge, product = _merge(mesh, approximate), _product(mesh, at_once, blocks.documents)
    firsts = range(0, len(documents), blocks.documents)
    # A caller may have set a mesh of fewer devices, as training does.
    with (
        jax.set_mesh(mesh),
        progress(total=len(starts) * len(firsts), unit="block", desc="search", disable=not show_progress) as bar,
    ):
        for first in firsts:
            scores_of = product(documents[first : first + blocks.documents])
            for i, start in enumerate(starts):
                scores = scores_of(_padded(queries[start : start + at_once], at_once))
                best[i] = merge(best[i], scores, np.int32(first))
                jax.block_until_ready(best[i - 1])  # no more than two at a time are in memory
                bar.update()
    found = [tuple(parallel.to_host(x) for x in of_queries) for of_queries in best]
    return Found(*(np.concatenate(parts)[: len(queries)] for parts in zip(_none(0, k), *found, strict=True)))


def block_sizes(memory_mb: int, width: int, k: int, queries: int, documents: int) -> Blocks:
    """The largest useful blocks that fit: documents take up to a quarter of the memory, scores and their best the rest."""
    numbers = memory_mb * 2**20 // 4
    most = min(MOST_DOCUMENTS, max(numbers // (4 * width), 1), documents)
    of_documents = -(-most // GROUP) * GROUP
    of_query = 2 * (of_documents + k * (GROUP + 4))  # the scores, what is gathered of them, and copies
    fitting = max(1, (numbers - of_documents * width) // of_query)
    return Blocks(min(MOST_QUERIES, fitting, max(queries, 1)), of_documents)


def _none(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf, np.float32)


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    return x if len(x) == rows else np.concatenate([x, np.zeros((rows - len(x), x.shape[1]), x.dtype)])


def _product(mesh: Mesh, queries: int, documents: int) -> Callable[[np.ndarray], Callable[[np.ndarray], jax.Array]]:
    """From a block of documents, to a function from a block of queries to the scores [q, n] on the devices of the queries.

    On CPUs numpy's BLAS multiplies, sooner than XLA, into one of two places by turns: the scores of a block are to be used
    before those of the next but one are asked for.
    """
    split, whole = parallel.split_batch(mesh), parallel.replicated(mesh)
    if jax.default_backend() != "cpu":
        return lambda block: functools.partial(_multiplied(mesh), parallel.put_whole(whole, block))
    places = itertools.cycle([parallel.aligned_empty((queries, documents), np.float32) for _ in range(2)])

    def by_blas(block: np.ndarray, some: np.ndarray) -> jax.Array:
        scores = next(places).reshape(-1)[: queries * len(block)].reshape(queries, -1)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return np.matmul(some[index[0]], block.T, out=scores[index[0]])

        return parallel.put_parts(split, scores.shape, part)

    return lambda block: functools.partial(by_blas, block)


@functools.cache
def _multiplied(mesh: Mesh) -> jax.stages.Wrapped:
    def scores(documents: jax.Array, queries: jax.Array) -> jax.Array:
        return jnp.matmul(queries, documents.T, precision=jax.lax.Precision.HIGHEST)

    split, whole = parallel.split_batch(mesh), parallel.replicated(mesh)
    return jax.jit(scores, in_shardings=(whole, split), out_shardings=split)


@functools.cache
def _merge(mesh: Mesh, approximate: bool) -> jax.stages.Wrapped:
    """The compiled `_merged` on each device's queries, in place of the best so far."""
    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    merged = functools.partial(_merged, approximate=approximate)
    mapped = jax.shard_map(merged, mesh=mesh, in_specs=(split, split, whole), out_specs=split)
    return jax.jit(mapped, donate_argnums=0)


def _merged(best: Best, scores: jax.Array, first: jax.Array, *, approximate: bool) -> Best:
    """The best so far merged with the scores of a block of documents, of which `first` is the first one's row."""
    k = best[0].shape[1]
    of_block = min(k, scores.shape[1])
    values, columns = jax.lax.approx_max_k(scores, of_block) if approximate else top_k(scores, of_block)
    values, order = jax.lax.top_k(jnp.concatenate([best[1], values], axis=1), k)
    rows = jnp.concatenate([best[0], first + columns], axis=1)
    return jnp.take_along_axis(rows, order, axis=1), values


def top_k(scores: Float[jax.Array, "q n"], k: int) -> tuple[jax.Array, jax.Array]:
    """What `jax.lax.top_k` gives, sooner. The k best of groups of columns lie in the k groups whose maxima are best, since
    each of those holds a score at least as high; columns behind the last whole group are looked at one by one.
    """
    queries, n = scores.shape
    count, rest = divmod(n, GROUP)
    if count <= k:
        return jax.lax.top_k(scores, k)
    groups = scores[:, : count * GROUP].reshape(queries, count, GROUP)
    chosen = jnp.sort(jax.lax.top_k(groups.max(axis=2), k)[1])  # in order, so that the first of equals stays first
    members = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(queries, k * GROUP)
    values, place = jax.lax.top_k(jnp.concatenate([members, scores[:, n - rest :]], axis=1), k)
    group = jnp.take_along_axis(chosen, jnp.minimum(place // GROUP, k - 1), axis=1)
    behind = place - k * GROUP
    return values, jnp.where(behind < 0, group * GROUP + place % GROUP, n - rest + behind)
