"""Grouped-query attention over packed rows. A mask is a value; nothing here asks for its name.

Two kernels compute the same thing: `einsum` holds the scores of all rows at once, `rows` goes row by row and recomputes
the scores in the backward pass, which on CPUs is faster and takes an eighth of the memory.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed import parallel
from jaxembed.model.layers import Linear, RMSNorm, at_least_float32, rotate
from jaxembed.model.lora import LoRA
from jaxembed.model.masks import Mask, Places, visible

# A group of rows whose scores fill about this many numbers is computed at once by the `rows` kernel.
SCORES_AT_ONCE = 1 << 22


def attend(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    places: Places,
    mask: Mask,
    window: jax.Array | int | None,
) -> Float[Array, "r t n h"]:
    """softmax(q k / sqrt(H)) v among the tokens that the mask and the segments let each other see."""
    rows, tokens, heads, width = q.shape
    q_RTGMH = q.reshape(rows, tokens, k.shape[2], -1, width)
    scores = at_least_float32(jnp.einsum("rtgmh,rsgh->rgmts", q_RTGMH, k)) * width**-0.5
    seen = visible(mask, places, window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("rgmts,rsgh->rtgmh", weights.astype(q.dtype), v).reshape(rows, tokens, heads, width)


def attend_by_rows(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    places: Places,
    mask: Mask,
    window: jax.Array | int | None,
    shards: int,
) -> Float[Array, "r t n h"]:
    """`attend`, some rows at a time. Rows are shard-major: each step takes rows of every shard, so all devices work."""
    rows, tokens, heads, _ = q.shape

    def by_turn(x: jax.Array) -> jax.Array:
        return x.reshape(shards, rows // shards, *x.shape[1:]).swapaxes(0, 1)

    def step(xs: tuple[jax.Array, jax.Array, jax.Array, Places]) -> jax.Array:
        return attend(*xs, mask, window)

    at_once = min(max(1, SCORES_AT_ONCE // (heads * tokens * tokens)), rows // shards)
    turns = jax.tree.map(by_turn, (q, k, v, places))
    out = jax.lax.map(jax.checkpoint(step), turns, batch_size=at_once)
    return out.swapaxes(0, 1).reshape(q.shape)


def pick_kernel(name: str, shards: int) -> Any:
    """The attention function of a config's `attention_kernel`; auto takes `rows` on CPUs and `einsum` elsewhere."""
    if name == "auto":
        name = "rows" if parallel.platform() == "cpu" else "einsum"
    return functools.partial(attend_by_rows, shards=shards) if name == "rows" else attend


class Attention(nn.Module):
    """Projections, optional norms of queries and keys, rotary positions, attention, output projection."""

    heads: int
    kv_heads: int
    head_width: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    norm_epsilon: float
    mask: Mask
    dtype: Any
    kernel: str
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "tokens d"],
        places: Places,
        rope: tuple[jax.Array, jax.Array],
        window: jax.Array | int | None,
        shards: int,
    ) -> Float[Array, "tokens d"]:
        def project(name: str, heads: int, axis: str) -> jax.Array:
            linear = Linear(heads * self.head_width, ("embed", axis), self.dtype, self.qkv_bias, lora=self.lora, name=name)
            return linear(x).reshape(*places.segment.shape, heads, self.head_width)

        q, k = project("q", self.heads, "heads"), project("k", self.kv_heads, "kv_heads")
        v = project("v", self.kv_heads, "kv_heads")
        if self.qk_norm:
            q = RMSNorm(self.norm_epsilon, self.dtype, name="q_norm")(q)
            k = RMSNorm(self.norm_epsilon, self.dtype, name="k_norm")(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        mixed = pick_kernel(self.kernel, shards)(q, k, v, places, self.mask, window)
        out = Linear(x.shape[-1], ("heads", "embed"), self.dtype, self.out_bias, lora=self.lora, name="out")
        return out(mixed.reshape(x.shape[0], -1))
