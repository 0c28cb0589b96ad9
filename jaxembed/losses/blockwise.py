"""Sums over all pairs of texts of a global batch, block by block.

No array of the size of all pairs exists, neither in the forward nor in the backward pass. The letters in shapes are n shards,
B anchors, N candidates, D vector width, G guide width, W candidates per block.
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
HIGHEST_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class PairRules:
    """Which pairs count as negatives, and with which logit.

    The logit of a score s is s * scale + hardness * s. The second term has no gradient.

    Attributes:
        false_negatives: Pairs that do not count.
        hardness: Additional weight of pairs with a high score.
        shards: Number of equal parts in which the anchors are split over devices, in order.
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
        positive: Score of each anchor's own pair (query, positive), [N].
        guide_positive: The same by the guide model, [N].
    """

    positive: Any
    guide_positive: Any


# (max logit, sum of e^(logit - max), max score, number of negatives) of each anchor over the blocks so far: [n, B/n] each.
BlockTotals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# (logsumexp, max score, number of negatives) of each anchor.
NegativeSums = tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]


def log_sum_exp(rules: PairRules, anchors: AnchorVectors, candidates: TextVectors, scale: Float[Array, ""]) -> NegativeSums:
    """Sum over the negatives of every anchor.

    Gradients reach the vectors of both sides and `scale`, through the first output only.

    Args:
        rules: Which candidates are negatives, and the form of their logits.
        anchors: B texts whose negatives are summed.
        candidates: N texts among which the negatives are.
        scale: Factor of the scores, 1 / temperature.

    Returns:
        For every anchor, the log of the sum of e^logit over its negatives, their highest score, and their number. Without
        negatives these are the lowest number of the dtype, -inf and 0.
    """
    metadata = jax.lax.stop_gradient((anchors.info, anchors.positive, anchors.guide_positive, candidates.info))
    return _log_sum_exp(rules, anchors.vectors, candidates.vectors, scale, metadata)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp(rules: PairRules, anchors: jax.Array, candidates: jax.Array, scale: jax.Array, metadata: Any) -> NegativeSums:
    return _forward(rules, anchors, candidates, scale, metadata)[0]


def _forward(
    rules: PairRules, anchors: jax.Array, candidates: jax.Array, scale: jax.Array, metadata: Any
) -> tuple[NegativeSums, Any]:
    """Return the sums, and what the backward pass needs: the inputs and the logsumexp of every anchor."""
    blocks = _PairBlocks(rules, anchors, candidates, metadata)
    lowest = jnp.finfo(anchors.dtype).min

    def add_block(totals: BlockTotals, block: Any) -> tuple[BlockTotals, None]:
        max_logit, total, max_score, count = totals
        scores, logits, is_negative = blocks.score(block, scale)
        # Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): a sum of e^(logit - max) is rescaled whenever a
        # block raises the maximum, so no exponential overflows.
        new_max = jnp.maximum(max_logit, logits.max(axis=-1))
        total = total * jnp.exp(max_logit - new_max) + jnp.sum(jnp.exp(logits - new_max[..., None]), axis=-1)
        max_score = jnp.maximum(max_score, jnp.where(is_negative, scores, -jnp.inf).max(axis=-1))
        return (new_max, total, max_score, count + is_negative.sum(axis=-1, dtype=jnp.int32)), None

    # Scan over the blocks of candidates; the totals of all anchors are the carry.
    zeros = jnp.zeros(blocks.anchors.shape[:2], anchors.dtype)
    start = (zeros + lowest, zeros, zeros - jnp.inf, zeros.astype(jnp.int32))
    (max_logit, total, max_score, count), _ = jax.lax.scan(add_block, start, blocks.columns)
    # An anchor without negatives has a total of 0. The inner `where` keeps log(0) out.
    lse = jnp.where(count > 0, max_logit + jnp.log(jnp.where(count > 0, total, 1)), lowest)
    sums = (lse.reshape(-1), max_score.reshape(-1), count.reshape(-1).astype(anchors.dtype))
    return sums, (anchors, candidates, scale, metadata, lse)


def _backward(rules: PairRules, saved: Any, grads: NegativeSums) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Return the gradients by anchors, candidates and scale. Every block of scores is computed again.

    With p = e^(logit - lse), the softmax over the negatives, and g the gradient of lse:
    d lse / d score = scale * p, so d anchors = scale * (g p) @ candidates, d candidates = scale * (g p)^T @ anchors, and
    d scale = sum of g p score.
    """
    anchors, candidates, scale, metadata, lse = saved
    blocks = _PairBlocks(rules, anchors, candidates, metadata)
    lse_grad = grads[0].reshape(lse.shape)[..., None]

    def add_block(sums: tuple[jax.Array, jax.Array], block: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        anchor_sum, scale_sum = sums
        scores, logits, _ = blocks.score(block, scale)
        weights = jnp.exp(logits - lse[..., None]) * lse_grad  # g p; 0 for pairs that do not count
        anchor_sum += jnp.einsum("nbw,wd->nbd", weights, block[0], precision=HIGHEST_PRECISION)
        block_sum = jnp.einsum("nbw,nbd->nwd", weights, blocks.anchors, precision=HIGHEST_PRECISION)
        return (anchor_sum, scale_sum + jnp.sum(weights * scores)), block_sum

    # Sums over candidates are the carry. Sums over anchors [n, W, D] are complete after their block, and are stacked.
    start = (jnp.zeros_like(blocks.anchors), jnp.zeros_like(scale))
    (anchor_sum, scale_sum), candidate_sums = jax.lax.scan(add_block, start, blocks.columns)
    # The parts of the shards are added after the last block, so that devices communicate once. The padding is cut off.
    candidate_sum = candidate_sums.sum(axis=1).reshape(-1, candidates.shape[-1])[: len(candidates)]
    return scale * anchor_sum.reshape(anchors.shape), scale * candidate_sum, scale_sum, None


_log_sum_exp.defvjp(_forward, _backward)


class _PairBlocks:
    """Anchors by shard, [n, B/n, ...], and candidates in blocks of equal size, which every device has whole."""

    def __init__(self, rules: PairRules, anchors: jax.Array, candidates: jax.Array, metadata: Any):
        anchor_info, positive, guide_positive, candidate_info = metadata
        self._rules, n = rules, rules.shards
        self.anchors = anchors.reshape(n, -1, anchors.shape[-1])
        rows = self.anchors.shape[1]
        # The metadata of anchors has a last axis of length 1, along which the candidates of a block broadcast.
        self._guide = anchor_info.guide.reshape(n, rows, -1)
        self._anchor_info = anchor_info.reshape(n, rows, 1)
        self._positive, self._guide_positive = (x.reshape(n, rows, 1) for x in (positive, guide_positive))
        # As few blocks as the limit allows, of equal width.
        count = -(-len(candidates) * rows // MAX_SCORES_PER_BLOCK)
        width = -(-len(candidates) // count)
        self.columns = jax.tree.map(lambda x: _split_blocks(replicate(x), count, width), (candidates, candidate_info))

    def score(self, block: tuple[jax.Array, TextInfo], scale: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the scores, the logits (-inf for pairs that are not negatives) and where pairs are negatives, [n, B/n, W]."""
        vectors, candidate_info = block
        scores = jnp.einsum("nbd,wd->nbw", self.anchors, vectors, precision=HIGHEST_PRECISION)
        rule, guide_scores = self._rules.false_negatives, None
        if rule.is_guided:
            guide_scores = jnp.einsum("nbg,wg->nbw", self._guide, candidate_info.guide, precision=HIGHEST_PRECISION)
        is_false = rule(self._anchor_info, candidate_info, scores, guide_scores, self._positive, self._guide_positive)
        is_negative = in_batch_candidates(self._anchor_info, candidate_info) & ~is_false
        return scores, jnp.where(is_negative, scores * (scale + self._rules.hardness), -jnp.inf), is_negative


def _split_blocks(x: jax.Array, count: int, width: int) -> jax.Array:
    """Return [count, width, ...], with zeros behind the last element: absent texts, which are nobody's negatives."""
    padding = [(0, count * width - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, padding).reshape(count, width, *x.shape[1:])
