"""From hidden states of packed rows to one vector a text. A pooling is a module; POOLINGS names them for configs.

Each maps (hidden [R, T, D], members [R, T, S], places [R, T]) to vectors [R, S, D] in at least float32, zeros for a text
that is not there. `members` are the tokens that are pooled into each text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxembed.model.layers import LayerNorm, Linear, at_least_float32
from jaxembed.model.masks import BIDIRECTIONAL, TokenInfo, visible


def segment_mask(segment_ids: Int[Array, "r t"], pool_mask: Bool[Array, "r t"], segments: int) -> Bool[Array, "r t s"]:
    """[R, T, S]: which tokens are pooled into which text of the row."""
    return (segment_ids[..., None] == jnp.arange(1, segments + 1)) & pool_mask[..., None]


def weighted_mean(values: Float[Array, "r t *d"], weights: Shaped[Array, "r t s"]) -> Float[Array, "r s *d"]:
    """The mean of the tokens' values under each text's weights; zeros where they are all zero."""
    wide = at_least_float32(values)
    weights = weights.astype(wide.dtype)
    total = jnp.einsum("rts,rt...->rs...", weights, wide, precision=jax.lax.Precision.HIGHEST)
    count = weights.sum(axis=1).reshape(*total.shape[:2], *[1] * (total.ndim - 2))
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0.0)


class MeanPooling(nn.Module):
    """Mean over a text's pooled tokens."""

    @nn.compact
    def __call__(self, hidden: jax.Array, members: jax.Array, places: TokenInfo) -> Float[Array, "r s d"]:
        return weighted_mean(hidden, members)


class PositionWeightedMeanPooling(nn.Module):
    """Mean weighted by the place in the text, counted from 1: later tokens of a causal model know more (SGPT,
    Muennighoff 2022, equation 2).
    """

    @nn.compact
    def __call__(self, hidden: jax.Array, members: jax.Array, places: TokenInfo) -> Float[Array, "r s d"]:
        return weighted_mean(hidden, members * (places.position + 1)[..., None])


class LastPooling(nn.Module):
    """The last pooled token, which is EOS where the tokenizer appends it."""

    @nn.compact
    def __call__(self, hidden: jax.Array, members: jax.Array, places: TokenInfo) -> Float[Array, "r s d"]:
        order = jnp.arange(members.shape[1])[:, None]
        return _picked(hidden, jnp.max(jnp.where(members, order, -1), axis=1))


class FirstPooling(nn.Module):
    """The first pooled token, which is BOS where the tokenizer puts one and the instruction is pooled too."""

    @nn.compact
    def __call__(self, hidden: jax.Array, members: jax.Array, places: TokenInfo) -> Float[Array, "r s d"]:
        first = jnp.argmax(members, axis=1)
        return _picked(hidden, jnp.where(members.any(axis=1), first, -1))


def _picked(hidden: Float[Array, "r t d"], index: Int[Array, "r s"]) -> Float[Array, "r s d"]:
    """The tokens at `index`; zeros for -1."""
    tokens = jnp.take_along_axis(at_least_float32(hidden), jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where(index[..., None] >= 0, tokens, 0.0)


class MaxPooling(nn.Module):
    """The maximum of each channel over a text's pooled tokens."""

    @nn.compact
    def __call__(self, hidden: jax.Array, members: jax.Array, places: TokenInfo) -> Float[Array, "r s d"]:
        texts = members.shape[-1]
        text = jnp.where(members.any(axis=-1), jnp.argmax(members, axis=-1), texts)  # pooled into none: one past the last
        largest = jax.vmap(lambda h, t: jax.ops.segment_max(h, t, num_segments=texts + 1))(at_least_float32(hidden), text)
        return jnp.where(members.any(axis=1)[..., None], largest[:, :texts], 0.0)


class GatedFeedForward(nn.Module):
    """out(value * gelu(gate)), the GEGLU of Shazeer 2020 with biases and the exact GELU; zero until trained."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(Linear(2 * self.hidden, ("embed", "mlp"), self.dtype, True, name="in")(x), 2, axis=-1)
        out = Linear(x.shape[-1], ("mlp", "embed"), self.dtype, True, init_std=0.0, name="out")
        return out(value * nn.gelu(gate, approximate=False))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, without biases; zero until trained. Returns its weights too."""

    heads: int
    head_width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """`x` [..., T, D], `context` [..., C, D], `seen` [..., T, C], None for everything.

        Returns [..., T, D] and weights [..., N, T, C].
        """
        width = self.heads * self.head_width

        def by_head(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, self.head_width)

        q = by_head(Linear(width, ("embed", "pooling_heads"), self.dtype, name="q")(x))
        k, v = jnp.split(Linear(2 * width, ("embed", "pooling_heads"), self.dtype, name="kv")(context), 2, axis=-1)
        scores = at_least_float32(jnp.einsum("...tnh,...cnh->...ntc", q, by_head(k))) * self.head_width**-0.5
        if seen is not None:
            scores = jnp.where(seen[..., None, :, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("...ntc,...cnh->...tnh", weights.astype(self.dtype), by_head(v))
        out = Linear(x.shape[-1], ("pooling_heads", "embed"), self.dtype, init_std=0.0, name="out")
        return out(mixed.reshape(*x.shape[:-1], width)), weights


class LatentAttentionPooling(nn.Module):
    """NV-Embed's latent attention as its released checkpoints compute it, then the mean (Lee et al. 2024, section 3.2).

    Tokens attend to a trained array of latents through a pre-norm residual block with heads as wide as the model, then
    pass a pre-norm residual GEGLU of four times the width. Both blocks give zero until trained, so that training starts
    from mean pooling. `paper` leaves out what the paper's equation 1 does not have: norms, projections, scaling and
    residuals; the heads are then slices of the width and a plain two-layer GELU follows.

    Under mutable "intermediates" it stores `latent_weights` [R, S, N, L]: a text's mean attention to each latent, by head
    (the paper's appendix C).
    """

    latents: int
    heads: int
    paper: bool = False

    @nn.compact
    def __call__(self, hidden: jax.Array, members: jax.Array, places: TokenInfo) -> Float[Array, "r s d"]:
        width, dtype = hidden.shape[-1], hidden.dtype
        init = nn.with_partitioning(nn.initializers.normal(1.0), ("latents", "embed"))
        latents = self.param("latents", init, (self.latents, width)).astype(dtype)
        if self.paper:
            out, weights = _plain_attention(hidden, latents, self.heads)
            inner = nn.gelu(Linear(4 * width, ("embed", "mlp"), dtype, True, name="mlp_in")(out), approximate=False)
            out = Linear(width, ("mlp", "embed"), dtype, True, name="mlp_out")(inner)
        else:
            context = LayerNorm(dtype, name="latent_norm")(latents)
            attention = CrossAttention(self.heads, width, dtype, name="attention")
            mixed, weights = attention(LayerNorm(dtype, name="attention_norm")(hidden), context, None)
            out = hidden + mixed
            out = out + GatedFeedForward(4 * width, dtype, name="mlp")(LayerNorm(dtype, name="mlp_norm")(out))
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "latent_weights", weighted_mean(jnp.moveaxis(weights, -3, -2), members))
        return weighted_mean(out, members)


def _plain_attention(hidden: jax.Array, latents: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """softmax(Q K^T) V with K = V = latents, by slices of the width: [R, T, D] and weights [R, N, T, L]."""
    q, kv = hidden.reshape(*hidden.shape[:-1], heads, -1), latents.reshape(latents.shape[0], heads, -1)
    weights = jax.nn.softmax(at_least_float32(jnp.einsum("rtnh,lnh->rntl", q, kv)), axis=-1)
    return jnp.einsum("rntl,lnh->rtnh", weights.astype(hidden.dtype), kv).reshape(hidden.shape), weights


class SelfAttentionPooling(nn.Module):
    """The self-attention that NV-Embed compares with: one more bidirectional block over the text, then the mean.

    Its blocks are those of `LatentAttentionPooling`, with the text's tokens in place of the latents.
    """

    heads: int

    @nn.compact
    def __call__(self, hidden: jax.Array, members: jax.Array, places: TokenInfo) -> Float[Array, "r s d"]:
        width, dtype = hidden.shape[-1], hidden.dtype
        normed = LayerNorm(dtype, name="attention_norm")(hidden)
        attention = CrossAttention(self.heads, width // self.heads, dtype, name="attention")
        out = hidden + attention(normed, normed, visible(BIDIRECTIONAL, places))[0]
        out = out + GatedFeedForward(4 * width, dtype, name="mlp")(LayerNorm(dtype, name="mlp_norm")(out))
        return weighted_mean(out, members)


TRAINED = ("latent_attention", "latent_attention_paper", "self_attention")  # those that have parameters
POOLINGS: dict[str, Callable[..., nn.Module]] = {
    "mean": MeanPooling,
    "last": LastPooling,
    "first": FirstPooling,
    "max": MaxPooling,
    "weighted_mean": PositionWeightedMeanPooling,
    "latent_attention": LatentAttentionPooling,
    "latent_attention_paper": functools.partial(LatentAttentionPooling, paper=True),
    "self_attention": SelfAttentionPooling,
}


def make_pooling(kind: str, latents: int, heads: int, name: str | None = None) -> nn.Module:
    """The pooling of this name; `latents` and `heads` are the sizes of those that have them."""
    sizes = {"latents": latents, "heads": heads} if kind.startswith("latent") else {"heads": heads}
    return POOLINGS[kind](name=name, **(sizes if kind in TRAINED else {}))
