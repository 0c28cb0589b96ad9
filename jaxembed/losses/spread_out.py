"""The spread-out regulariser (Zhang et al. 2017, Global Orthogonal Regularization; as used by EmbeddingGemma)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import SpreadOutConfig
from jaxembed.losses.blockwise import EXACT
from jaxembed.losses.encoded import Encoded, Loss


def spread_out(config: SpreadOutConfig, encoded: Encoded) -> Loss:
    """M1^2 + max(0, M2 - 1/D) of the queries, plus that of their positives: zero for vectors spread over the sphere.

    M1 and M2 are the means of the cosines, and of their squares, of all pairs of different texts of one kind. Both come out
    of sums over texts, so nothing grows with the number of pairs: sum of squares of all products = |E^T E|^2.
    """
    counted = encoded.share > 0
    first, second = (_moments(x, counted) for x in (encoded.queries, encoded.documents[:, 0]))
    least = 1 / encoded.queries.shape[-1]
    losses = [m1**2 + jax.nn.relu(m2 - least) for m1, m2 in (first, second)]
    return losses[0] + losses[1], {"mean_cosine": first[0], "mean_squared_cosine": first[1]}


def _moments(vectors: Float[Array, "b d"], counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """M1 and M2 among the counted vectors; 0 for less than two."""
    vectors = jnp.where(counted[:, None], vectors, 0)
    n = counted.sum().astype(vectors.dtype)
    squares = jnp.sum(vectors**2, axis=-1)
    total = jnp.sum(vectors, axis=0)
    gram = jnp.matmul(vectors.T, vectors, precision=EXACT)
    pairs = jnp.maximum(n * (n - 1), 1)
    return (total @ total - squares.sum()) / pairs, (jnp.sum(gram**2) - jnp.sum(squares**2)) / pairs
