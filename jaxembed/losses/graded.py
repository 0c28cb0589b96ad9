"""Objectives for pairs with a score: rank the pairs by their scores, or match the scores.

A query and its document 0 are a pair. Letters in shapes: B pairs, D vector width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxembed.config import AnglEConfig, CoSENTConfig, CosineRegressionConfig
from jaxembed.devices.collectives import replicate
from jaxembed.losses.encoded import EncodedBatch, LossAndMetrics

BLOCK_SIZE = 128  # pairs whose cumulative sums are computed at once


def cosent(config: CoSENTConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return log(1 + sum of e^((s_low - s_high)/t)), with cosines s, over all two pairs of which one has the higher score.

    CoSENT (Su 2022, Huang et al. 2024, doi:10.1109/TASLP.2024.3402087), and the cosine objective of AnglE (arXiv:2309.12871).

    Returns:
        The loss, and the metric `pairs`: the number of pairs with a score.
    """
    return _rank_pairs(compute_cosines(encoded), encoded, config.temperature)


def angle(config: AnglEConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return CoSENT's loss of angle similarities (AnglE, arXiv:2309.12871; equation 4 of the survey arXiv:2406.01607).

    The paper's equation subtracts the terms the other way around. This follows the published code and sentence-transformers,
    where the higher score is to have the higher value.

    Returns:
        The loss, and the metric `pairs`: the number of pairs with a score.
    """
    similarities = compute_angle_similarities(encoded.queries, encoded.documents[:, 0])
    return _rank_pairs(similarities, encoded, config.temperature)


def cosine_regression(config: CosineRegressionConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return the mean over pairs of (cosine - score)^2 (Reimers and Gurevych 2019, arXiv:1908.10084).

    Returns:
        The loss, and the metric `pairs`: the number of pairs with a score.
    """
    weights = encoded.query_weights
    is_counted = weights > 0
    errors = compute_cosines(encoded) - jnp.where(is_counted, encoded.batch.score, 0)
    return jnp.sum(weights * errors**2), {"pairs": is_counted.sum().astype(weights.dtype)}


def compute_cosines(encoded: EncodedBatch) -> Float[Array, " b"]:
    """Return the cosine of each query with its document 0."""
    return jnp.sum(encoded.queries * encoded.documents[:, 0], axis=-1)


def compute_angle_similarities(queries: Float[Array, "b d"], documents: Float[Array, "b d"]) -> Float[Array, " b"]:
    """Return |sum of the real and imaginary parts of z / w| for unit vectors as complex numbers z and w.

    The first half of a vector has the real parts, the second half the imaginary parts. An odd width is padded with a zero.
    For unit vectors, z / w = z * conj(w) / |w|^2 has the real parts ac + bd and the imaginary parts bc - ad.
    """
    padding = [(0, 0), (0, queries.shape[-1] % 2)]
    (a, b), (c, d) = (jnp.split(jnp.pad(x, padding), 2, axis=-1) for x in (queries, documents))
    return jnp.abs(jnp.sum(a * c + b * d + b * c - a * d, axis=-1))


def _rank_pairs(similarities: Float[Array, " b"], encoded: EncodedBatch, temperature: float) -> LossAndMetrics:
    # Every device needs the B similarities and scores of the whole batch. These are few numbers.
    is_counted = encoded.query_weights > 0
    scores = encoded.batch.score.astype(similarities.dtype)
    loss = rank_by_score(replicate(similarities), replicate(scores), replicate(is_counted), temperature)
    return loss, {"pairs": is_counted.sum().astype(similarities.dtype)}


def rank_by_score(
    similarities: Float[Array, " b"], scores: Float[Array, " b"], is_counted: Bool[Array, " b"], temperature: float
) -> Float[Array, ""]:
    """Return log(1 + sum of e^((s_i - s_j)/t)) over all i, j with a lower score of i than of j, and both counted.

    No array of all i and j exists. For a pair j, the terms of all i are e^(-s_j/t) times a sum over the pairs with lower
    scores. In the order of the scores this is a cumulative sum. Memory is linear in B, and so is time, up to sorting.
    """
    lowest = jnp.finfo(similarities.dtype).min
    # Sort by score, pairs that are not counted last.
    scores = jnp.where(is_counted, scores, jnp.inf)
    order = jnp.argsort(scores)
    scores, is_counted = scores[order], is_counted[order]
    logits = jnp.where(is_counted, similarities[order] / temperature, lowest)
    # The log of the sum of e^(s_i/t) over the pairs up to each one. Only those before the first equal score count.
    sums = _cumulative_log_sum_exp(logits)
    places = jnp.arange(len(scores))
    is_first = jnp.concatenate([jnp.ones(1, bool), scores[1:] > scores[:-1]])
    lower_count = jax.lax.cummax(jnp.where(is_first, places, 0))
    # The log of the sum over i of each j, then over all j, beside e^0 = 1.
    is_ranked = is_counted & (lower_count > 0)
    terms = sums[jnp.maximum(lower_count - 1, 0)] - jnp.where(is_ranked, logits, 0)
    return jax.nn.logsumexp(jnp.append(jnp.where(is_ranked, terms, lowest), 0))


def _cumulative_log_sum_exp(logits: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return the log of the sum of e^x over the numbers up to each one, block by block.

    Each block subtracts its own maxima, so numbers far below the largest one of the batch are not lost.
    """
    lowest = jnp.finfo(logits.dtype).min
    blocks = jnp.pad(logits, (0, -len(logits) % BLOCK_SIZE), constant_values=lowest).reshape(-1, BLOCK_SIZE)
    is_up_to = jnp.tril(jnp.ones((BLOCK_SIZE, BLOCK_SIZE), bool))

    @jax.checkpoint
    def add_block(total: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = jnp.logaddexp(total, jax.nn.logsumexp(jnp.where(is_up_to, block, lowest), axis=-1))
        return sums[-1], sums

    return jax.lax.scan(add_block, jnp.array(lowest, logits.dtype), blocks)[1].reshape(-1)[: len(logits)]
