"""Objectives that follow a teacher: its scores of a query's documents, or its vectors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import DistillationConfig, EmbeddingMatchingConfig, MarginMSEConfig
from jaxembed.losses.blockwise import EXACT
from jaxembed.losses.encoded import Encoded, Loss
from jaxembed.model.layers import unit_length


def kl_distillation(config: DistillationConfig, encoded: Encoded) -> Loss:
    """Mean over queries of (1 - a) KL(teacher || model) + a (-log p of the positive) over each query's own documents.

    Both distributions are softmaxes of scores over temperatures; a is `hard_labels` (E5, arXiv:2212.03533, equation 2, whose
    weight of the hard labels is a / (1 - a) here). Documents without a teacher's score, and queries with less than two
    scored documents, are left out.
    """
    scores, teacher, scored, share = _scored(encoded)
    least = jnp.finfo(scores.dtype).min
    log_p = jax.nn.log_softmax(jnp.where(scored, scores / config.temperature, least), axis=-1)
    log_t = jax.nn.log_softmax(jnp.where(scored, teacher / config.teacher_temperature, least), axis=-1)
    kl = jnp.sum(jnp.where(scored, jnp.exp(log_t) * (log_t - log_p), 0), axis=-1)
    losses = (1 - config.hard_labels) * kl - config.hard_labels * log_p[:, 0]
    return jnp.sum(jnp.where(share > 0, share * losses, 0)), {"scored": jnp.sum(share > 0).astype(scores.dtype)}


def margin_mse(config: MarginMSEConfig, encoded: Encoded) -> Loss:
    """Mean over queries and their negatives of ((s+ - s-) - (t+ - t-))^2, t being the teacher's scores.

    Hofstätter et al. 2020, arXiv:2010.02666. Negatives without a teacher's score are left out, and queries whose positive
    has none.
    """
    scores, teacher, scored, share = _scored(encoded)
    error = ((scores[:, :1] - scores) - (teacher[:, :1] - teacher))[:, 1:]
    counted = scored[:, 1:]
    losses = jnp.sum(jnp.where(counted, error**2, 0), axis=-1) / jnp.maximum(counted.sum(axis=-1), 1)
    return jnp.sum(share * losses), {"scored": jnp.sum(share > 0).astype(scores.dtype)}


def embedding_matching(config: EmbeddingMatchingConfig, encoded: Encoded) -> Loss:
    """Mean over queries and their documents of the squared distance of the model's vector, projected where there is a
    projection and of unit length again, to the teacher's.

    EmbedDistill (Kim et al. 2023, arXiv:2301.12005).
    """
    teacher = encoded.batch.teacher
    assert teacher is not None
    ours = jnp.concatenate([encoded.queries[:, None], encoded.documents], axis=1)
    theirs = jnp.concatenate([teacher.queries[:, None], teacher.documents], axis=1)
    if "kernel" in encoded.params:
        ours = unit_length(jnp.matmul(ours, encoded.params["kernel"], precision=EXACT))
    present = jnp.concatenate([jnp.ones_like(encoded.batch.doc_slot[:, :1], bool), encoded.batch.doc_slot >= 0], axis=1)
    distance = jnp.sum((ours - theirs) ** 2, axis=-1)
    losses = jnp.sum(jnp.where(present, distance, 0), axis=-1) / present.sum(axis=-1)
    return jnp.sum(encoded.share * losses), {}


def new_projection(width: int, teacher_width: int, key: jax.Array) -> dict[str, Any]:
    """The projection from a model's width to its teacher's; none where they are equal."""
    if width == teacher_width:
        return {}
    return {"kernel": jax.random.normal(key, (width, teacher_width)) / math.sqrt(width)}


def _scored(encoded: Encoded) -> tuple[Float[Array, "b m"], Float[Array, "b m"], jax.Array, jax.Array]:
    """The model's and the teacher's scores of each query's documents, which of them count, and each query's part of the mean
    over those queries whose positive and another document are scored.
    """
    scores = jnp.einsum("bd,bmd->bm", encoded.queries, encoded.documents, precision=EXACT)
    teacher = encoded.batch.teacher_scores
    scored = jnp.isfinite(teacher) & (encoded.batch.doc_slot >= 0)
    enough = scored[:, 0] & (scored.sum(axis=-1) >= 2) & (encoded.share > 0)
    share = enough / jnp.maximum(enough.sum(), 1).astype(scores.dtype)
    return scores, jnp.where(scored, teacher, 0).astype(scores.dtype), scored, share
