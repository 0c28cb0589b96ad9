"""Exact nearest documents by dot product, block by block, on the mesh or on CPUs. The full score matrix is never in memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxembed.devices.cpu import is_tuned
from jaxembed.devices.mesh import BATCH_AXES, count_shards, make_mesh
from jaxembed.devices.placement import make_batch_sharding, make_replicated_sharding, put_global, to_host
from jaxembed.devices.processes import progress_bar
from jaxembed.search.two_pass import choose_tile_sizes, is_worthwhile, search_in_two_passes

GROUP_SIZE = 32  # documents per group; `top_k` compares groups by their best scores
MAX_QUERIES_PER_BLOCK, MAX_DOCUMENTS_PER_BLOCK = 512, 131072  # larger blocks are no faster
MAX_FAISS_QUERIES = 1024  # in one call
FAISS_BLOCK_DOCUMENTS = 1024  # documents per block inside FAISS
DEFAULT_MEMORY_MB = 512


TopK = tuple[jax.Array, jax.Array]  # rows int32 [q, k] and scores float32 [q, k]


class SearchResult(NamedTuple):
    """The best documents of one query [k] or of several [Q, k], best first.

    Attributes:
        indices: Rows of the documents in their array, int32.
        scores: Their dot products with the query, float32.
    """

    indices: np.ndarray
    scores: np.ndarray


def select_best(rows: np.ndarray, scores: np.ndarray, k: int) -> SearchResult:
    """Return the k best of the documents of each query, [Q, n] each. Of equal scores, the earlier one is first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return SearchResult(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))


class BlockSizes(NamedTuple):
    """The sizes of a block of scores.

    Attributes:
        queries: Queries on each device.
        documents: Documents on each device.
    """

    queries: int
    documents: int


def search(
    queries: Float[np.ndarray, "q d"],
    documents: Float[np.ndarray, "n d"],
    k: int,
    *,
    memory_mb: int = DEFAULT_MEMORY_MB,
    approximate: bool = False,
    show_progress: bool = False,
) -> SearchResult:
    """Find the k documents nearest to each query by dot product.

    - On CPUs with instructions for bfloat16, a large search has two passes (`search_in_two_passes`).
    - On other CPUs, and for queries with very many equal scores, FAISS does the search if it is installed.
    - Otherwise queries are split over all devices, and blocks of documents are scored one after another.

    Args:
        queries: Query vectors.
        documents: Document vectors.
        k: Documents per query. If there are fewer documents, all are returned.
        memory_mb: Memory of the search on each device in MiB, besides the vectors and the result.
        approximate: Use `jax.lax.approx_max_k`, which is faster on TPUs and finds nearly all of the nearest documents.
        show_progress: Show a progress bar.

    Returns:
        Indices and scores, [Q, min(k, N)]. Ties are ordered by row.
    """
    k = min(k, len(documents))
    if not k:
        return SearchResult(*_make_empty_top_k(len(queries), 0))
    if approximate:
        return _search_on_mesh(queries, documents, k, memory_mb, approximate, show_progress)
    sizes = choose_tile_sizes(memory_mb, queries.shape[1], k, len(queries)) if is_worthwhile(queries, documents) else None
    if sizes is None:
        return _search_in_float32(queries, documents, k, memory_mb, show_progress)
    rows, scores, unsure = search_in_two_passes(queries, documents, k, sizes, show_progress)
    if len(unsure):
        rows[unsure], scores[unsure] = _search_in_float32(queries[unsure], documents, k, memory_mb, show_progress)
    return SearchResult(rows, scores)


def _search_in_float32(queries: np.ndarray, documents: np.ndarray, k: int, memory_mb: int, show_progress: bool) -> SearchResult:
    """Search with FAISS where possible, otherwise on the mesh."""
    if _can_use_faiss():
        return _search_with_faiss(queries, documents, k, min(k + 1, len(documents)), memory_mb, show_progress)
    return _search_on_mesh(queries, documents, k, memory_mb, False, show_progress)


def _can_use_faiss() -> bool:
    """Return whether vectors are searched on CPUs, and FAISS is installed."""
    if not is_tuned(jax.default_backend()):
        return False
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def _search_with_faiss(
    queries: np.ndarray, documents: np.ndarray, k: int, fetch_k: int, memory_mb: int, show_progress: bool = False
) -> SearchResult:
    """Search with FAISS. Ties are ordered by row, as in `search`.

    FAISS does not define the order of equal scores, or which of them it leaves out. So more than k documents are fetched.
    Queries whose ties may continue after the last fetched document are searched again with twice as many.

    Args:
        queries: Query vectors.
        documents: Document vectors.
        k: Documents to return per query.
        fetch_k: Documents to fetch from FAISS per query, more than k if there are more.
        memory_mb: Memory of the search in MiB.
        show_progress: Show a progress bar.
    """
    import faiss

    result = SearchResult(*_make_empty_top_k(len(queries), k))
    step = choose_faiss_batch_size(memory_mb, fetch_k)
    for start in progress_bar(range(0, len(queries), step), unit="block", desc="search", disable=not show_progress):
        scores, rows = faiss.knn(queries[start : start + step], documents, fetch_k, faiss.METRIC_INNER_PRODUCT)
        # Sort equal scores by row.
        has_ties = (scores[:, 1:] == scores[:, :-1]).any(axis=1)
        rows[has_ties] = np.take_along_axis(rows[has_ties], np.lexsort((rows[has_ties], -scores[has_ties])), axis=1)
        result.indices[start : start + step], result.scores[start : start + step] = rows[:, :k], scores[:, :k]
        # Search again, deeper, where the last fetched score equals the k-th one: lower rows of that score may be missing.
        unsure = start + np.flatnonzero(scores[:, k - 1] == scores[:, -1])
        if len(unsure) and fetch_k < len(documents):
            deeper = _search_with_faiss(queries[unsure], documents, k, min(2 * fetch_k, len(documents)), memory_mb)
            result.indices[unsure], result.scores[unsure] = deeper
    return result


def choose_faiss_batch_size(memory_mb: int, k: int) -> int:
    """Return the number of queries per FAISS call. Each query takes a block of scores, twice the k best, and the result."""
    bytes_per_query = 4 * FAISS_BLOCK_DOCUMENTS + k * (2 * 12 + 12)
    return max(1, min(MAX_FAISS_QUERIES, memory_mb * 2**20 // bytes_per_query))


def _search_on_mesh(
    queries: np.ndarray, documents: np.ndarray, k: int, memory_mb: int, approximate: bool, show_progress: bool
) -> SearchResult:
    """Search on the devices of JAX. Queries are split over them, and each block of documents is on all of them."""
    mesh = make_mesh()
    split, replicated = make_batch_sharding(mesh), make_replicated_sharding(mesh)
    sizes = choose_block_sizes(memory_mb, queries.shape[1], k, len(queries), len(documents))
    query_step = sizes.queries * count_shards(mesh)
    query_starts = range(0, len(queries), query_step)
    document_starts = range(0, len(documents), sizes.documents)
    # Every block of queries starts without documents, and keeps its k best while the blocks of documents pass.
    best = [put_global(split, _make_empty_top_k(query_step, k)) for _ in query_starts]
    merge_block = _compile_merge_block(mesh, approximate)
    blocks = len(query_starts) * len(document_starts)
    with (
        jax.set_mesh(mesh),  # a caller may have set a mesh of fewer devices, as training does
        progress_bar(total=blocks, unit="block", desc="search", disable=not show_progress) as bar,
    ):
        for first in document_starts:
            document_block = put_global(replicated, documents[first : first + sizes.documents])
            for i, start in enumerate(query_starts):
                query_block = put_global(split, _pad_rows(queries[start : start + query_step], query_step))
                best[i] = merge_block(best[i], query_block, document_block, np.int32(first))
                jax.block_until_ready(best[i - 1])  # so that at most two blocks are in memory
                bar.update()
    results = [tuple(to_host(x) for x in block) for block in best]
    return SearchResult(
        *(np.concatenate(parts)[: len(queries)] for parts in zip(_make_empty_top_k(0, k), *results, strict=True))
    )


def choose_block_sizes(memory_mb: int, width: int, k: int, queries: int, documents: int) -> BlockSizes:
    """Return the largest useful block sizes that fit into memory.

    A block of documents takes up to a quarter of the memory; the scores and the k best take the rest.

    Args:
        memory_mb: Memory on each device in MiB.
        width: Width of the vectors.
        k: Documents to find per query.
        queries: Number of all queries.
        documents: Number of all documents.
    """
    floats = memory_mb * 2**20 // 4
    max_documents = min(MAX_DOCUMENTS_PER_BLOCK, max(floats // (4 * width), 1), documents)
    block_documents = -(-max_documents // GROUP_SIZE) * GROUP_SIZE
    floats_per_query = 2 * (block_documents + k * (GROUP_SIZE + 4))  # scores and what is gathered from them, with copies
    fitting_queries = max(1, (floats - block_documents * width) // floats_per_query)
    return BlockSizes(min(MAX_QUERIES_PER_BLOCK, fitting_queries, max(queries, 1)), block_documents)


def _make_empty_top_k(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf, np.float32)


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    return x if len(x) == rows else np.concatenate([x, np.zeros((rows - len(x), x.shape[1]), x.dtype)])


@functools.cache
def _compile_merge_block(mesh: Mesh, approximate: bool) -> jax.stages.Wrapped:
    """Return `_merge_block` jitted for the queries of each device. It overwrites the best so far."""
    split, replicated = PartitionSpec(BATCH_AXES), PartitionSpec()
    merge = functools.partial(_merge_block, approximate=approximate)
    mapped = jax.shard_map(merge, mesh=mesh, in_specs=(split, split, replicated, replicated), out_specs=split)
    return jax.jit(mapped, donate_argnums=0)


def _merge_block(best: TopK, queries: jax.Array, documents: jax.Array, first_row: jax.Array, *, approximate: bool) -> TopK:
    """Merge the k best documents so far with those of a block, whose first document has row `first_row`."""
    # Score the block and keep its k best.
    k = best[0].shape[1]
    scores = jnp.matmul(queries, documents.T, precision=jax.lax.Precision.HIGHEST)
    block_k = min(k, len(documents))
    block_scores, columns = jax.lax.approx_max_k(scores, block_k) if approximate else top_k(scores, block_k)
    # Merge both lists. Earlier documents come first in it, so that they stay first among equal scores.
    merged_scores, order = jax.lax.top_k(jnp.concatenate([best[1], block_scores], axis=1), k)
    merged_rows = jnp.concatenate([best[0], first_row + columns], axis=1)
    return jnp.take_along_axis(merged_rows, order, axis=1), merged_scores


def top_k(scores: Float[jax.Array, "q n"], k: int) -> tuple[jax.Array, jax.Array]:
    """Return what `jax.lax.top_k` returns, but faster: values and columns [q, k].

    Columns are divided into groups. The k best scores are in the k groups with the highest maxima, because each of these groups
    has a score at least as high as any score outside them. So only these groups are searched, and the columns after the last
    full group.
    """
    queries, n = scores.shape
    group_count, rest = divmod(n, GROUP_SIZE)
    if group_count <= k:
        return jax.lax.top_k(scores, k)
    # Choose the k groups with the highest maxima. Sort them, so that the first of equal scores stays first.
    groups = scores[:, : group_count * GROUP_SIZE].reshape(queries, group_count, GROUP_SIZE)
    group_indices = jnp.sort(jax.lax.top_k(groups.max(axis=2), k)[1])
    # Find the k best among the members of these groups and the columns after the last group.
    members = jnp.take_along_axis(groups, group_indices[:, :, None], axis=1).reshape(queries, k * GROUP_SIZE)
    values, index = jax.lax.top_k(jnp.concatenate([members, scores[:, n - rest :]], axis=1), k)
    # Turn indices into these candidates back into columns.
    group = jnp.take_along_axis(group_indices, jnp.minimum(index // GROUP_SIZE, k - 1), axis=1)
    rest_index = index - k * GROUP_SIZE
    return values, jnp.where(rest_index < 0, group * GROUP_SIZE + index % GROUP_SIZE, n - rest + rest_index)
