"""Exact nearest documents by dot product, block by block, on the mesh or by FAISS: no score matrix is ever whole."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxembed.devices.mesh import BATCH_AXES, make_mesh, shard_count
from jaxembed.devices.placement import batch_sharding, put_global, replicated_sharding, to_host
from jaxembed.devices.processes import progress

GROUP = 32  # documents whose best score stands for them
MOST_QUERIES, MOST_DOCUMENTS = 512, 131072  # of a block; larger ones are no faster
FAISS_QUERIES, FAISS_DOCUMENTS = 1024, 1024  # given at a time; of the blocks that it makes of them by itself
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

    Of equal scores the document that comes first is first. On CPUs FAISS searches, where it is installed; else queries are
    split over all devices, a block of documents at a time is on each, and the best of a query so far are merged with the
    block's. `memory_mb` is what that takes on a device, beside the vectors and what is returned. `approximate` asks
    `jax.lax.approx_max_k` for a block's best, which is faster on TPUs and finds nearly all.
    """
    k = min(k, len(documents))
    if not k:
        return Found(*_none(len(queries), 0))
    faiss = None if approximate else _faiss()
    if faiss is None:
        return _on_mesh(queries, documents, k, memory_mb, approximate, show_progress)
    return _by_faiss(faiss, queries, documents, k, min(k + 1, len(documents)), memory_mb, show_progress)


def _faiss() -> Any:
    """The library, or None where vectors are not searched on CPUs, or it is not installed."""
    if jax.default_backend() != "cpu":
        return None
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _by_faiss(
    faiss: Any, queries: np.ndarray, documents: np.ndarray, k: int, asked: int, memory_mb: int, show_progress: bool = False
) -> Found:
    """As `search`. FAISS leaves open which of equal scores come first, and which are left out: it is asked for more than k,
    and for twice as many where these still end with the k-th score.
    """
    found = Found(*_none(len(queries), k))
    at_once = faiss_queries(memory_mb, asked)
    for start in progress(range(0, len(queries), at_once), unit="block", desc="search", disable=not show_progress):
        scores, rows = faiss.knn(queries[start : start + at_once], documents, asked, faiss.METRIC_INNER_PRODUCT)
        tied = (scores[:, 1:] == scores[:, :-1]).any(axis=1)
        rows[tied] = np.take_along_axis(rows[tied], np.lexsort((rows[tied], -scores[tied])), axis=1)
        found.rows[start : start + at_once], found.scores[start : start + at_once] = rows[:, :k], scores[:, :k]
        cut = start + np.flatnonzero(scores[:, k - 1] == scores[:, -1])
        if len(cut) and asked < len(documents):
            again = _by_faiss(faiss, queries[cut], documents, k, min(2 * asked, len(documents)), memory_mb)
            found.rows[cut], found.scores[cut] = again
    return found


def faiss_queries(memory_mb: int, k: int) -> int:
    """How many queries FAISS is given at a time: it holds scores of each, twice its best, and what it returns."""
    of_query = 4 * FAISS_DOCUMENTS + k * (2 * 12 + 12)
    return max(1, min(FAISS_QUERIES, memory_mb * 2**20 // of_query))


def _on_mesh(
    queries: np.ndarray, documents: np.ndarray, k: int, memory_mb: int, approximate: bool, show_progress: bool
) -> Found:
    """As `search`, by the devices of JAX."""
    mesh = make_mesh()
    split, whole = batch_sharding(mesh), replicated_sharding(mesh)
    blocks = block_sizes(memory_mb, queries.shape[1], k, len(queries), len(documents))
    at_once = blocks.queries * shard_count(mesh)
    starts = range(0, len(queries), at_once)
    best = [put_global(split, _none(at_once, k)) for _ in starts]
    merge = _merge(mesh, approximate)
    firsts = range(0, len(documents), blocks.documents)
    # A caller may have set a mesh of fewer devices, as training does.
    with (
        jax.set_mesh(mesh),
        progress(total=len(starts) * len(firsts), unit="block", desc="search", disable=not show_progress) as bar,
    ):
        for first in firsts:
            block = put_global(whole, documents[first : first + blocks.documents])
            for i, start in enumerate(starts):
                some = put_global(split, _padded(queries[start : start + at_once], at_once))
                best[i] = merge(best[i], some, block, np.int32(first))
                jax.block_until_ready(best[i - 1])  # no more than two at a time are in memory
                bar.update()
    found = [tuple(to_host(x) for x in of_queries) for of_queries in best]
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


@functools.cache
def _merge(mesh: Mesh, approximate: bool) -> jax.stages.Wrapped:
    """The compiled `_merged` on each device's queries, in place of the best so far."""
    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    merged = functools.partial(_merged, approximate=approximate)
    mapped = jax.shard_map(merged, mesh=mesh, in_specs=(split, split, whole, whole), out_specs=split)
    return jax.jit(mapped, donate_argnums=0)


def _merged(best: Best, queries: jax.Array, documents: jax.Array, first: jax.Array, *, approximate: bool) -> Best:
    """The best so far merged with those of a block of documents, of which `first` is the first one's row."""
    k = best[0].shape[1]
    scores = jnp.matmul(queries, documents.T, precision=jax.lax.Precision.HIGHEST)
    of_block = min(k, len(documents))
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
