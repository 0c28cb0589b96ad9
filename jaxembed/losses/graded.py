"""Objectives for scored pairs: rank the pairs by their scores, or regress the scores.

A pair is a query and its document 0. Letters in shapes: B pairs, D vector width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxembed.config import AnglEConfig, CoSENTConfig, CosineRegressionConfig
from jaxembed.devices.collectives import replicate
from jaxembed.losses.encoded import EncodedBatch, LossAndMetrics

BLOCK_SIZE = 128  # pairs per block of the cumulative sum


def cosent(config: CoSENTConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return log(1 + sum over i, j of e^((cos_i - cos_j) / t)), over all i, j such that pair j has a higher score than pair i.

    CoSENT (Su 2022, Huang et al. 2024, doi:10.1109/TASLP.2024.3402087), and the cosine objective of AnglE (arXiv:2309.12871).

    Returns:
        The loss, and the metric `pairs`: the number of pairs with a score.
    """
    return _rank_pairs(compute_cosines(encoded), encoded, config.temperature)


def angle(config: AnglEConfig, encoded: EncodedBatch) -> LossAndMetrics:
    """Return the CoSENT loss of angle similarities (AnglE, arXiv:2309.12871; equation 4 of the survey arXiv:2406.01607).

    The paper's equation has the opposite sign. This follows the published code and sentence-transformers, which rank a pair
    with a higher score above one with a lower score.

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
    """Return |sum of the real and imaginary parts of z * conj(w)|, for queries z and documents w as complex vectors.

    The first half of a vector has the real parts, the second half the imaginary parts. An odd width is padded with a zero.
    With z = a + bi and w = c + di, the real parts are ac + bd and the imaginary parts bc - ad. AnglE also divides them by
    the norms, which are 1 here.
    """
    padding = [(0, 0), (0, queries.shape[-1] % 2)]
    (a, b), (c, d) = (jnp.split(jnp.pad(x, padding), 2, axis=-1) for x in (queries, documents))
    return jnp.abs(jnp.sum(a * c + b * d + b * c - a * d, axis=-1))


def _rank_pairs(similarities: Float[Array, " b"], encoded: EncodedBatch, temperature: float) -> LossAndMetrics:
    """Return `rank_by_score` over the scored pairs of a batch, and the metric `pairs`."""
    # Every device needs the similarities and scores of the whole batch, two arrays of B values.
    is_counted = encoded.query_weights > 0
    scores = encoded.batch.score.astype(similarities.dtype)
    loss = rank_by_score(replicate(similarities), replicate(scores), replicate(is_counted), temperature)
    return loss, {"pairs": is_counted.sum().astype(similarities.dtype)}


def rank_by_score(
    similarities: Float[Array, " b"], scores: Float[Array, " b"], is_counted: Bool[Array, " b"], temperature: float
) -> Float[Array, ""]:
    """Return log(1 + sum of e^((s_i - s_j) / t)), for similarities s, over all counted i, j such that score i < score j.

    No B x B array is built. The terms of a pair j sum to e^(-s_j / t) times the sum of e^(s_i / t) over all pairs with lower
    scores. After sorting by score, this is a cumulative sum. So memory is linear in B, and so is time except for the sort.
    """
    lowest = jnp.finfo(similarities.dtype).min
    # Sort by score, pairs that are not counted last.
    scores = jnp.where(is_counted, scores, jnp.inf)
    order = jnp.argsort(scores)
    scores, is_counted = scores[order], is_counted[order]
    logits = jnp.where(is_counted, similarities[order] / temperature, lowest)
    # The log of the sum of e^(s_i/t) over the pairs up to each one.
    sums = _cumulative_log_sum_exp(logits)
    # Pairs with an equal score must not count. The index of the first pair with the same score is the number of lower pairs.
    is_first = jnp.concatenate([jnp.ones(1, bool), scores[1:] > scores[:-1]])
    lower_count = jax.lax.cummax(jnp.where(is_first, jnp.arange(len(scores)), 0))
    # The log of the sum over i for each j, then over all j and e^0 = 1.
    is_ranked = is_counted & (lower_count > 0)
    terms = sums[jnp.maximum(lower_count - 1, 0)] - jnp.where(is_ranked, logits, 0)
    return jax.nn.logsumexp(jnp.append(jnp.where(is_ranked, terms, lowest), 0))


def _cumulative_log_sum_exp(logits: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return the cumulative log-sum-exp, computed block by block.

    Each block subtracts the running maximum, so values far below the maximum of the batch do not underflow.
    """
    lowest = jnp.finfo(logits.dtype).min
    blocks = jnp.pad(logits, (0, -len(logits) % BLOCK_SIZE), constant_values=lowest).reshape(-1, BLOCK_SIZE)
    prefix_mask = jnp.tril(jnp.ones((BLOCK_SIZE, BLOCK_SIZE), bool))

    @jax.checkpoint
    def add_block(total: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = jnp.logaddexp(total, jax.nn.logsumexp(jnp.where(prefix_mask, block, lowest), axis=-1))
        return sums[-1], sums

    return jax.lax.scan(add_block, jnp.array(lowest, logits.dtype), blocks)[1].reshape(-1)[: len(logits)]
