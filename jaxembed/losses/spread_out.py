"""The spread-out regularizer (Zhang et al. 2017, arXiv:1708.06320), as used by EmbeddingGemma (arXiv:2509.20354)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import SpreadOutConfig
from jaxembed.losses.blockwise import HIGHEST_PRECISION
from jaxembed.losses.encoded import EncodedBatch, LossAndMetrics


def spread_out(config: SpreadOutConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return M1^2 + max(0, M2 - 1/D) of the queries, plus that of their positives.

    M1 and M2 are the means of the cosines and of the squared cosines of all pairs of different texts of one kind. The loss is
    zero for vectors that are spread evenly over the sphere. Both means are computed from sums over texts, so memory does not
    grow with the number of pairs: the squared dot products of all pairs of rows of E add up to |E^T E|^2 (Frobenius norm).

    Returns:
        The loss, and the metrics `mean_cosine` and `mean_squared_cosine` of the queries.
    """
    is_counted = encoded.query_weights > 0
    query_moments, positive_moments = (_compute_moments(x, is_counted) for x in (encoded.queries, encoded.documents[:, 0]))
    uniform_m2 = 1 / encoded.queries.shape[-1]
    losses = [m1**2 + jax.nn.relu(m2 - uniform_m2) for m1, m2 in (query_moments, positive_moments)]
    return losses[0] + losses[1], {"mean_cosine": query_moments[0], "mean_squared_cosine": query_moments[1]}


def _compute_moments(vectors: Float[Array, "b d"], is_counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return M1 and M2 over all pairs of different vectors where `is_counted` [B], or zeros for fewer than two of them."""
    vectors = jnp.where(is_counted[:, None], vectors, 0)
    n = is_counted.sum().astype(vectors.dtype)
    # Sums over all pairs include each vector with itself, which is subtracted.
    squares = jnp.sum(vectors**2, axis=-1)
    total = jnp.sum(vectors, axis=0)
    gram = jnp.matmul(vectors.T, vectors, precision=HIGHEST_PRECISION)
    pair_count = jnp.maximum(n * (n - 1), 1)
    return (total @ total - squares.sum()) / pair_count, (jnp.sum(gram**2) - jnp.sum(squares**2)) / pair_count
