"""Compute the log-sum-exp over all pairs of texts of a global batch, block by block.

The full score matrix [B, N] is never materialized, in the forward or the backward pass. Letters in shapes: n shards, B anchors,
N candidates, D vector width, G guide width, W candidates per block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.devices.collectives import replicate
from jaxembed.losses.negatives import FalseNegativeRule, TextInfo, in_batch_candidates

# Scores per block on each device: enough for fast matmuls, and little memory beside the activations of a step.
MAX_SCORES_PER_BLOCK = 1 << 22
# For similarities: by default, GPUs and TPUs may round the inputs of a float32 matmul to fewer bits.
HIGHEST_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class PairRules:
    """Rules for pairs (anchor, candidate): which are negatives, and what their logits are.

    The logit of a score s is s * scale + hardness * s. The second term has no gradient: it multiplies the weight of a negative
    by e^(hardness * s).

    Attributes:
        false_negatives: Rule for the candidates that must not count as negatives.
        hardness: Factor of the score in the second term of the logit; 0 turns it off.
        shards: Number of equal, contiguous parts into which the anchors are split over devices.
    """

    false_negatives: FalseNegativeRule
    hardness: float = 0.0
    shards: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextVectors:
    """Vectors [N, D] with the metadata of their texts [N]."""

    vectors: Any
    info: TextInfo


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchorVectors(TextVectors):
    """Anchors: texts whose negatives are summed.

    Attributes:
        positive_scores: Score of each anchor's positive pair (query, positive), [N].
        guide_positive_scores: The guide model's scores of the same pairs, [N].
    """

    positive_scores: Any
    guide_positive_scores: Any


# (max logit, sum of e^(logit - max), max score, number of negatives) of each anchor over the blocks so far: [n, B/n] each.
BlockTotals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# (log-sum-exp, max score, number of negatives) of each anchor: [B] each.
NegativeSums = tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]


def log_sum_exp(rules: PairRules, anchors: AnchorVectors, candidates: TextVectors, scale: Float[Array, ""]) -> NegativeSums:
    """Compute the log-sum-exp of the logits of every anchor's negatives.

    Gradients reach the vectors of both sides and `scale`, through the first output only.

    Args:
        rules: Which candidates are negatives, and what their logits are.
        anchors: B texts whose negatives are summed.
        candidates: N texts, of which some are negatives of an anchor.
        scale: Factor of the scores, 1 / temperature.

    Returns:
        Three arrays [B]: the log of the sum of e^logit over an anchor's negatives, their highest score, and their number. For
        an anchor without negatives these are the lowest finite number of the dtype, -inf and 0.
    """
    metadata = jax.lax.stop_gradient((anchors.info, anchors.positive_scores, anchors.guide_positive_scores, candidates.info))
    return _log_sum_exp(rules, anchors.vectors, candidates.vectors, scale, metadata)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp(rules: PairRules, anchors: jax.Array, candidates: jax.Array, scale: jax.Array, metadata: Any) -> NegativeSums:
    """Compute `log_sum_exp`, with a backward pass that keeps only the log-sum-exp of every anchor, not the scores."""
    return _forward(rules, anchors, candidates, scale, metadata)[0]


def _forward(
    rules: PairRules, anchors: jax.Array, candidates: jax.Array, scale: jax.Array, metadata: Any
) -> tuple[NegativeSums, Any]:
    """Return the sums and the residuals for the backward pass: the inputs and the log-sum-exp of every anchor [n, B/n]."""
    blocks = _PairBlocks(rules, anchors, candidates, metadata)
    lowest = jnp.finfo(anchors.dtype).min

    def add_block(totals: BlockTotals, block: Any) -> tuple[BlockTotals, None]:
        max_logit, total, max_score, count = totals
        scores, logits, is_negative = blocks.score(block, scale)
        max_logit, total = add_exponentials(max_logit, total, logits)
        max_score = jnp.maximum(max_score, jnp.where(is_negative, scores, -jnp.inf).max(axis=-1))
        return (max_logit, total, max_score, count + is_negative.sum(axis=-1, dtype=jnp.int32)), None

    # Scan over the blocks of candidates; the totals of all anchors are the carry.
    zeros = jnp.zeros(blocks.anchors.shape[:2], anchors.dtype)
    start = (zeros + lowest, zeros, zeros - jnp.inf, zeros.astype(jnp.int32))
    (max_logit, total, max_score, count), _ = jax.lax.scan(add_block, start, blocks.candidate_blocks)
    # An anchor without negatives has a total of 0. The inner `where` keeps log(0) out.
    lse = jnp.where(count > 0, max_logit + jnp.log(jnp.where(count > 0, total, 1)), lowest)
    sums = (lse.reshape(-1), max_score.reshape(-1), count.reshape(-1).astype(anchors.dtype))
    return sums, (anchors, candidates, scale, metadata, lse)


def add_exponentials(max_logit: jax.Array, total: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add a block of logits to a sum of exponentials (online softmax; Milakov and Gimelshein 2018, arXiv:1805.02867).

    The sum of e^(logit - max) is rescaled whenever a block raises the maximum, so no exponential overflows.

    Args:
        max_logit: Maximum so far, [...]. It gets no gradient.
        total: Sum of e^(logit - max_logit) so far, [...].
        logits: The block, [..., W].

    Returns:
        The new maximum and sum.
    """
    new_max = jax.lax.stop_gradient(jnp.maximum(max_logit, logits.max(axis=-1)))
    return new_max, total * jnp.exp(max_logit - new_max) + jnp.sum(jnp.exp(logits - new_max[..., None]), axis=-1)


def _backward(rules: PairRules, residuals: Any, grads: NegativeSums) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Return the gradients of anchors, candidates and scale, and None for the metadata. Recomputes each block of scores.

    With p = e^(logit - lse), the softmax over the negatives, and g the gradient of lse:
    d lse / d score = scale * p, so d anchors = scale * (g p) @ candidates, d candidates = scale * (g p)^T @ anchors, and
    d scale = sum of g p score.
    """
    anchors, candidates, scale, metadata, lse = residuals
    blocks = _PairBlocks(rules, anchors, candidates, metadata)
    lse_grad = grads[0].reshape(lse.shape)[..., None]

    def add_block(sums: tuple[jax.Array, jax.Array], block: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        anchor_sum, scale_sum = sums
        scores, logits, _ = blocks.score(block, scale)
        weights = jnp.exp(logits - lse[..., None]) * lse_grad  # g p; 0 for pairs that are not negatives
        anchor_sum += jnp.einsum("nbw,wd->nbd", weights, block[0], precision=HIGHEST_PRECISION)
        block_sum = jnp.einsum("nbw,nbd->nwd", weights, blocks.anchors, precision=HIGHEST_PRECISION)
        return (anchor_sum, scale_sum + jnp.sum(weights * scores)), block_sum

    # The anchors' gradients sum over all blocks, so they are the carry. The gradients of a block's candidates [n, W, D] are
    # complete after that block, so they are stacked.
    start = (jnp.zeros_like(blocks.anchors), jnp.zeros_like(scale))
    (anchor_sum, scale_sum), candidate_sums = jax.lax.scan(add_block, start, blocks.candidate_blocks)
    # Sum the shards' parts after the last block, so that devices communicate once. Then remove the padding.
    candidate_sum = candidate_sums.sum(axis=1).reshape(-1, candidates.shape[-1])[: len(candidates)]
    return scale * anchor_sum.reshape(anchors.shape), scale * candidate_sum, scale_sum, None


_log_sum_exp.defvjp(_forward, _backward)


class _PairBlocks:
    """Anchors split into shards, [n, B/n, ...], and candidates split into equal blocks, replicated on every device."""

    def __init__(self, rules: PairRules, anchors: jax.Array, candidates: jax.Array, metadata: Any):
        anchor_info, positive_scores, guide_positive_scores, candidate_info = metadata
        self._rules, n = rules, rules.shards
        self.anchors = anchors.reshape(n, -1, anchors.shape[-1])
        anchors_per_shard = self.anchors.shape[1]
        # The metadata of anchors has a last axis of length 1, along which the candidates of a block broadcast.
        self._guide = anchor_info.guide.reshape(n, anchors_per_shard, -1)
        self._anchor_info = anchor_info.reshape(n, anchors_per_shard, 1)
        self._positive_scores = positive_scores.reshape(n, anchors_per_shard, 1)
        self._guide_positive_scores = guide_positive_scores.reshape(n, anchors_per_shard, 1)
        # As few blocks as the limit allows, of equal width.
        block_count = -(-len(candidates) * anchors_per_shard // MAX_SCORES_PER_BLOCK)
        block_width = -(-len(candidates) // block_count)
        self.candidate_blocks = jax.tree.map(
            lambda x: _split_blocks(replicate(x), block_count, block_width), (candidates, candidate_info)
        )

    def score(self, block: tuple[jax.Array, TextInfo], scale: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return scores, logits (-inf where a pair is not a negative) and True where it is a negative: [n, B/n, W] each."""
        vectors, candidate_info = block
        scores = jnp.einsum("nbd,wd->nbw", self.anchors, vectors, precision=HIGHEST_PRECISION)
        rule, guide_scores = self._rules.false_negatives, None
        if rule.is_guided:
            guide_scores = jnp.einsum("nbg,wg->nbw", self._guide, candidate_info.guide, precision=HIGHEST_PRECISION)
        is_false_negative = rule(
            self._anchor_info, candidate_info, scores, guide_scores, self._positive_scores, self._guide_positive_scores
        )
        is_negative = in_batch_candidates(self._anchor_info, candidate_info) & ~is_false_negative
        # `_backward` differentiates only scale * s, so the second term, hardness * s, has no gradient.
        return scores, jnp.where(is_negative, scores * (scale + self._rules.hardness), -jnp.inf), is_negative


def _split_blocks(x: jax.Array, count: int, width: int) -> jax.Array:
    """Split [N, ...] into [count, width, ...], padded at the end with zeros: absent texts, which are never negatives."""
    padding = [(0, count * width - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, padding).reshape(count, width, *x.shape[1:])
