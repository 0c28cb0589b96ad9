"""Sums over all pairs of a global batch, block by block: no array of the size of all pairs exists, forward or backward."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.devices.collectives import replicate
from jaxembed.losses.negatives import FalseNegatives, Texts, in_batch_candidates

# Scores of a block, on each device: enough for fast products, little beside the activations of a step.
SCORES_AT_ONCE = 1 << 22
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which pairs count, and how: the score s of one enters as s * scale + hardness * s, the latter without gradient.

    shards: into so many equal parts the anchors are split over devices, in order.
    """

    false_negatives: FalseNegatives
    hardness: float = 0.0
    shards: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """Vectors [N, D] and what is known of their texts."""

    vectors: Any
    texts: Texts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors(Side):
    """Also the scores of the queries' positives, and a guide model's of them."""

    positive: Any  # [N]
    guide_positive: Any  # [N]


Running = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Sums = tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]


def log_sum_exp(pairs: Pairs, anchors: Anchors, others: Side, scale: Float[Array, ""]) -> Sums:
    """For every anchor: log of the sum of e^logit over its negatives, their highest score, their number.

    The first is the dtype's least number, and the second -inf, where there are none. Gradients go to both sides' vectors
    and to `scale`, through the first alone.
    """
    known = jax.lax.stop_gradient((anchors.texts, anchors.positive, anchors.guide_positive, others.texts))
    return _log_sum_exp(pairs, anchors.vectors, others.vectors, scale, known)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp(pairs: Pairs, anchors: jax.Array, others: jax.Array, scale: jax.Array, known: Any) -> Sums:
    return _forward(pairs, anchors, others, scale, known)[0]


def _forward(pairs: Pairs, anchors: jax.Array, others: jax.Array, scale: jax.Array, known: Any) -> tuple[Sums, Any]:
    blocks = _Blocks(pairs, anchors, others, known)
    least = jnp.finfo(anchors.dtype).min

    def add(sums: Running, block: Any) -> tuple[Running, None]:
        top, total, highest, count = sums
        scores, logits, keep = blocks.logits(block, scale)
        new_top = jnp.maximum(top, logits.max(axis=-1))
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[..., None]), axis=-1)
        highest = jnp.maximum(highest, jnp.where(keep, scores, -jnp.inf).max(axis=-1))
        return (new_top, total, highest, count + keep.sum(axis=-1, dtype=jnp.int32)), None

    empty = jnp.zeros(blocks.anchors.shape[:2], anchors.dtype)
    start = (empty + least, empty, empty - jnp.inf, empty.astype(jnp.int32))
    (top, total, highest, count), _ = jax.lax.scan(add, start, blocks.columns)
    lse = jnp.where(count > 0, top + jnp.log(jnp.where(count > 0, total, 1)), least)
    sums = (lse.reshape(-1), highest.reshape(-1), count.reshape(-1).astype(anchors.dtype))
    return sums, (anchors, others, scale, known, lse)


def _backward(pairs: Pairs, saved: Any, grads: Sums) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    anchors, others, scale, known, lse = saved
    blocks = _Blocks(pairs, anchors, others, known)
    grad = grads[0].reshape(lse.shape)[..., None]

    def add(sums: tuple[jax.Array, jax.Array], block: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        of_anchors, of_scale = sums
        scores, logits, _ = blocks.logits(block, scale)
        share = jnp.exp(logits - lse[..., None]) * grad
        of_anchors += jnp.einsum("nbw,wd->nbd", share, block[0], precision=EXACT)
        return (of_anchors, of_scale + jnp.sum(share * scores)), jnp.einsum(
            "nbw,nbd->nwd", share, blocks.anchors, precision=EXACT
        )

    start = (jnp.zeros_like(blocks.anchors), jnp.zeros_like(scale))
    (of_anchors, of_scale), of_others = jax.lax.scan(add, start, blocks.columns)
    # Each shard's part is summed after the last block, so that devices speak once.
    of_others = of_others.sum(axis=1).reshape(-1, others.shape[-1])[: len(others)]
    return scale * of_anchors.reshape(anchors.shape), scale * of_others, of_scale, None


_log_sum_exp.defvjp(_forward, _backward)


class _Blocks:
    """Anchors by shard, [n, B/n, ...], and the others in equal blocks, of which every device sees all."""

    def __init__(self, pairs: Pairs, anchors: jax.Array, others: jax.Array, known: Any):
        texts, positive, guide_positive, other_texts = known
        self._pairs, n = pairs, pairs.shards
        self.anchors = anchors.reshape(n, -1, anchors.shape[-1])
        rows = self.anchors.shape[1]
        self._guide = texts.guide.reshape(n, rows, -1)
        self._texts = texts.reshape(n, rows, 1)
        self._positive, self._guide_positive = (x.reshape(n, rows, 1) for x in (positive, guide_positive))
        count = -(-len(others) * rows // SCORES_AT_ONCE)
        width = -(-len(others) // count)
        self.columns = jax.tree.map(lambda x: _in_blocks(replicate(x), count, width), (others, other_texts))

    def logits(self, block: tuple[jax.Array, Texts], scale: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scores, logits (-inf where the pair does not count), and whether it counts: each [n, B/n, W]."""
        vectors, others = block
        scores = jnp.einsum("nbd,wd->nbw", self.anchors, vectors, precision=EXACT)
        rule = self._pairs.false_negatives
        guide = jnp.einsum("nbg,wg->nbw", self._guide, others.guide, precision=EXACT) if rule.guided else None
        false = rule(self._texts, others, scores, guide, self._positive, self._guide_positive)
        keep = in_batch_candidates(self._texts, others) & ~false
        return scores, jnp.where(keep, scores * (scale + self._pairs.hardness), -jnp.inf), keep


def _in_blocks(x: jax.Array, count: int, width: int) -> jax.Array:
    """[count, width, ...], zeros behind the last."""
    padding = [(0, count * width - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, padding).reshape(count, width, *x.shape[1:])
