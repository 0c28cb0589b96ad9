"""InfoNCE over the global batch (van den Oord et al. 2018; equation 1 of the survey arXiv:2406.01607)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.data.batch import Batch
from jaxembed.losses.negatives import negative_mask


def info_nce(
    queries: Float[Array, "b d"], documents: Float[Array, "b m d"], batch: Batch, temperature: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean over queries of -log(e^(s+/t) / (e^(s+/t) + sum over negatives of e^(s-/t))), s being dot products.

    Vectors of unit length make s the cosine. Also returns `accuracy`, the share of queries nearer to their positive than
    to every negative, and `negatives`, how many a query met on average. A query without negatives has loss 0.
    """
    exact = jax.lax.Precision.HIGHEST
    positive = jnp.sum(queries * documents[:, 0], axis=-1) / temperature
    scores = jnp.matmul(queries, documents.reshape(-1, documents.shape[-1]).T, precision=exact) / temperature
    negative = negative_mask(batch)
    scores = jnp.where(negative, scores, jnp.finfo(scores.dtype).min)
    loss = jnp.logaddexp(positive, jax.nn.logsumexp(scores, axis=-1)) - positive
    metrics = {
        "accuracy": jnp.mean(positive > scores.max(axis=-1)).astype(loss.dtype),
        "negatives": jnp.mean(negative.sum(axis=-1)).astype(loss.dtype),
    }
    return loss.mean(), metrics


OBJECTIVES = {"infonce": info_nce}
