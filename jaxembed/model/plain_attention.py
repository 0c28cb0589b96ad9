"""Attention over packed rows in plain JAX: the reference for all attention kernels, and a version that saves memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.model.layers import promote_to_float32
from jaxembed.model.masks import Mask, TokenInfo, materialize_mask

# Scores that the `rows` kernel computes at once (8 MiB in float32). At least one row of each shard is computed.
MAX_SCORES_PER_GROUP = 1 << 21


class AttentionDropout(NamedTuple):
    """Dropout of attention weights, such as Hugging Face's `attention_dropout`.

    Attributes:
        rate: Share of the weights that become zero.
        key: Random key.
    """

    rate: float
    key: jax.Array

    def __call__(self, weights: jax.Array) -> jax.Array:
        """Return the weights with some of them zero, and the rest divided by 1 - rate."""
        is_kept = jax.random.bernoulli(self.key, 1 - self.rate, weights.shape)
        return jnp.where(is_kept, weights / (1 - self.rate), 0)


def attend_einsum(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
    dropout: AttentionDropout | None = None,
) -> Float[Array, "r t n h"]:
    """Return softmax(q k^T / sqrt(H)) v over the tokens that a query sees according to mask and segment.

    It takes seven parameters because it is called like the kernels of other platforms, and has dropout too.

    Args:
        q: Queries. Head n reads the key-value head n // (N / G).
        k: Keys.
        v: Values.
        token_info: Segments and positions of the tokens, [R, T] each.
        mask: Which tokens of a text see each other.
        window: Sliding window of the layer in tokens, or None.
        dropout: Dropout of the weights after the softmax.
    """
    rows, tokens, heads, width = q.shape
    # Query heads that share a key-value head lie along a new axis M = N / G.
    q_RTGMH = q.reshape(rows, tokens, k.shape[2], -1, width)
    # Scores and softmax are in float32: in 16 bits, small differences between large scores would be lost.
    scores_RGTMS = promote_to_float32(jnp.einsum("rtgmh,rsgh->rgtms", q_RTGMH, k)) * width**-0.5
    seen = materialize_mask(mask, token_info, window)[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores_RGTMS, jnp.finfo(scores_RGTMS.dtype).min), axis=-1)
    if dropout is not None:
        weights = dropout(weights)
    # With the values first, the weights are multiplied in their own layout instead of transposed: a fifth faster on CPUs.
    return jnp.einsum("rsgh,rgtms->rtgmh", v, weights.astype(q.dtype)).reshape(rows, tokens, heads, width)


def attend_rows(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
    shards: int,
    dropout: AttentionDropout | None = None,
) -> Float[Array, "r t n h"]:
    """Compute `attend_einsum` for some rows at a time.

    It takes more than six arguments because it is called like the other kernels. `pick_kernel` binds `shards`, the number of
    equal, contiguous parts into which the rows are split over devices.
    """
    rows, tokens, heads, _ = q.shape

    # [R, ...] -> [R / shards, shards, ...]: each step takes rows of every shard, so that all devices work.
    def interleave_shards(x: jax.Array) -> jax.Array:
        return x.reshape(shards, rows // shards, *x.shape[1:]).swapaxes(0, 1)

    def attend(xs: tuple[jax.Array, jax.Array, jax.Array, TokenInfo, jax.Array | None]) -> jax.Array:
        q, k, v, token_info, key = xs
        step_dropout = None if dropout is None or key is None else AttentionDropout(dropout.rate, key)
        return attend_einsum(q, k, v, token_info, mask, window, step_dropout)

    # `lax.map` loops over groups of steps. `checkpoint` recomputes a group's scores in the backward pass, so that only one
    # group's scores are in memory at a time.
    group_size = min(max(1, MAX_SCORES_PER_GROUP // (heads * tokens * tokens)), rows // shards)
    steps = jax.tree.map(interleave_shards, (q, k, v, token_info))
    keys = None if dropout is None else jax.random.split(dropout.key, rows // shards)
    steps = (*steps, keys)
    out = jax.lax.map(jax.checkpoint(attend), steps, batch_size=group_size)
    return out.swapaxes(0, 1).reshape(q.shape)
