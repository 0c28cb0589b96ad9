"""Held-out retrieval and similarity: exact search by blocks on the mesh, nDCG, recall, Spearman."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jaxembed import parallel

QUERIES_AT_ONCE = 256  # on a device

Encode = Callable[[Sequence[str], str], np.ndarray]  # (texts, instruction) -> vectors [N, D]


@functools.partial(jax.jit, static_argnames="k")
def _top_k(queries: jax.Array, documents: jax.Array, k: int) -> jax.Array:
    scores = jnp.matmul(queries, documents.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(scores, k)[1]


def search(queries: Float[np.ndarray, "q d"], documents: Float[np.ndarray, "n d"], k: int) -> Int[np.ndarray, "q k"]:
    """Rows of the k documents nearest to each query by dot product, best first.

    A block of queries at a time is split over all devices, each of which holds all documents.
    """
    mesh = parallel.make_mesh()
    at_once = QUERIES_AT_ONCE * parallel.shard_count(mesh)
    k = min(k, len(documents))
    everywhere = jax.device_put(documents, parallel.replicated(mesh))
    padded = np.zeros((-(-len(queries) // at_once) * at_once, queries.shape[1]), queries.dtype)
    padded[: len(queries)] = queries
    split = [parallel.put_batch(mesh, padded[i : i + at_once]) for i in range(0, len(padded), at_once)]
    blocks = [_top_k(block, everywhere, k) for block in split]
    return np.concatenate([np.asarray(block) for block in blocks])[: len(queries)]


def ndcg(relevant: Sequence[Mapping[int, int]], ranked: Int[np.ndarray, "q k"]) -> float:
    """Mean nDCG@k with the grade as gain, as trec_eval and BEIR count it; k is the width of `ranked`."""
    discounts = 1 / np.log2(np.arange(ranked.shape[1]) + 2)
    scores = []
    for grades, rows in zip(relevant, ranked, strict=True):
        gain = sum(grades.get(int(row), 0) * discount for row, discount in zip(rows, discounts, strict=True))
        ideal = sorted(grades.values(), reverse=True)[: len(discounts)]
        scores.append(gain / sum(grade * discount for grade, discount in zip(ideal, discounts, strict=False)))
    return float(np.mean(scores))


def recall(relevant: Sequence[Mapping[int, int]], ranked: Int[np.ndarray, "q k"]) -> float:
    """Mean share of a query's relevant documents among the first k."""
    shares = [len(grades.keys() & set(rows.tolist())) / len(grades) for grades, rows in zip(relevant, ranked, strict=True)]
    return float(np.mean(shares))


def spearman(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"], scores: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation of the pairs' cosines (of unit vectors) with given scores."""
    return float(stats.spearmanr(np.sum(a * b, axis=1), scores).statistic)
