"""Distillation objectives: match the teacher's scores of a query's documents, or its vectors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import DistillationConfig, EmbeddingMatchingConfig, MarginMSEConfig
from jaxembed.losses.blockwise import HIGHEST_PRECISION
from jaxembed.losses.encoded import EncodedBatch, LossAndMetrics
from jaxembed.model.layers import l2_normalize


def kl_distillation(config: DistillationConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return the mean over queries of (1 - a) KL(teacher || model) + a (-log p of the positive).

    Both distributions are softmaxes over a query's own documents, of scores divided by temperatures. The weight a is
    `hard_labels` (E5, arXiv:2212.03533, equation 2, which weights the hard labels with a / (1 - a) instead). Documents without
    a teacher score are left out. So are queries whose positive has no teacher score, or with fewer than two scored documents.

    Returns:
        The loss, and the metric `scored`: the number of queries that are not left out.
    """
    scores, teacher, is_scored, query_weights = _compute_scores(config, encoded)
    lowest = jnp.finfo(scores.dtype).min
    log_p = jax.nn.log_softmax(jnp.where(is_scored, scores / config.temperature, lowest), axis=-1)
    log_t = jax.nn.log_softmax(jnp.where(is_scored, teacher / config.teacher_temperature, lowest), axis=-1)
    kl = jnp.sum(jnp.where(is_scored, jnp.exp(log_t) * (log_t - log_p), 0), axis=-1)
    losses = (1 - config.hard_labels) * kl - config.hard_labels * log_p[:, 0]
    loss = jnp.sum(jnp.where(query_weights > 0, query_weights * losses, 0))
    return loss, {"scored": jnp.sum(query_weights > 0).astype(scores.dtype)}


def margin_mse(config: MarginMSEConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return the mean over queries and their negatives of ((s+ - s-) - (t+ - t-))^2, with teacher scores t.

    Hofstätter et al. 2020, arXiv:2010.02666. Negatives without a teacher score are left out, and so are queries
    whose positive or all of whose negatives have none.

    Returns:
        The loss, and the metric `scored`: the number of queries that are not left out.
    """
    scores, teacher, is_scored, query_weights = _compute_scores(config, encoded)
    error = ((scores[:, :1] - scores) - (teacher[:, :1] - teacher))[:, 1:]
    is_counted = is_scored[:, 1:]
    losses = jnp.sum(jnp.where(is_counted, error**2, 0), axis=-1) / jnp.maximum(is_counted.sum(axis=-1), 1)
    return jnp.sum(query_weights * losses), {"scored": jnp.sum(query_weights > 0).astype(scores.dtype)}


def embedding_matching(config: EmbeddingMatchingConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return the mean squared distance between the model's and the teacher's vectors, over queries and their documents.

    EmbedDistill (Kim et al. 2023, arXiv:2301.12005). If the widths differ, the model's vectors are first projected to the
    teacher's width and normalized again.
    """
    teacher = encoded.batch.teacher
    assert teacher is not None
    vectors = jnp.concatenate([encoded.queries[:, None], encoded.documents], axis=1)
    teacher_vectors = jnp.concatenate([teacher.queries[:, None], teacher.documents], axis=1)
    if "kernel" in encoded.params:
        vectors = l2_normalize(jnp.matmul(vectors, encoded.params["kernel"], precision=HIGHEST_PRECISION))
    is_present = jnp.concatenate([jnp.ones_like(encoded.batch.doc_slot[:, :1], bool), encoded.batch.doc_slot >= 0], axis=1)
    distance = jnp.sum((vectors - teacher_vectors) ** 2, axis=-1)
    losses = jnp.sum(jnp.where(is_present, distance, 0), axis=-1) / is_present.sum(axis=-1)
    return jnp.sum(encoded.query_weights * losses), {}


def init_teacher_projection(width: int, teacher_width: int, key: jax.Array) -> dict[str, Any]:
    """Initialize the projection {"kernel": [width, teacher_width]}, or return {} if the widths are equal."""
    if width == teacher_width:
        return {}
    return {"kernel": jax.random.normal(key, (width, teacher_width)) / math.sqrt(width)}


def _compute_scores(
    config: DistillationConfig | MarginMSEConfig, encoded: EncodedBatch
) -> tuple[Float[Array, "b m"], Float[Array, "b m"], jax.Array, jax.Array]:
    """Compute the scores of each query's own documents, and the masks and weights for the losses.

    The teacher's scores come from the data, or are the cosines of its vectors if the objective names a teacher.

    Returns:
        The model's scores [B, 1+K]; the teacher's scores [B, 1+K], 0 where there is none; True where the teacher scored a
        present document [B, 1+K]; and the weights of the queries [B] in the mean, 0 for those that are left out. A query needs
        teacher scores of its positive and of another document.
    """
    scores = jnp.einsum("bd,bmd->bm", encoded.queries, encoded.documents, precision=HIGHEST_PRECISION)
    teacher = encoded.batch.teacher_scores
    if config.teacher is not None:
        vectors = encoded.batch.teacher
        assert vectors is not None
        teacher = jnp.einsum("bd,bmd->bm", vectors.queries, vectors.documents, precision=HIGHEST_PRECISION)
    is_scored = jnp.isfinite(teacher) & (encoded.batch.doc_slot >= 0)
    is_counted = is_scored[:, 0] & (is_scored.sum(axis=-1) >= 2) & (encoded.query_weights > 0)
    query_weights = is_counted / jnp.maximum(is_counted.sum(), 1).astype(scores.dtype)
    return scores, jnp.where(is_scored, teacher, 0).astype(scores.dtype), is_scored, query_weights
