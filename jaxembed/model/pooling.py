"""Pooling modules, which map hidden states of packed rows to one vector per text. `POOLINGS` lists them by config name.

Each is called with these arguments:

- `hidden`: Hidden states of the tokens, [R, T, D].
- `segment_mask`: True where a token is pooled into a text of its row, [R, T, S].
- `token_info`: Segments and positions of the tokens, [R, T] each.

It returns vectors [R, S, D] in at least float32, with zeros for absent texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxembed.model.layers import LayerNorm, Linear, promote_to_float32
from jaxembed.model.masks import BIDIRECTIONAL, TokenInfo, materialize_mask


def make_segment_mask(segment_ids: Int[Array, "r t"], pool_mask: Bool[Array, "r t"], segments: int) -> Bool[Array, "r t s"]:
    """Return True where a token is pooled into a text of its row. The text in column s has segment id s + 1."""
    return (segment_ids[..., None] == jnp.arange(1, segments + 1)) & pool_mask[..., None]


def compute_weighted_mean(values: Float[Array, "r t *d"], weights: Shaped[Array, "r t s"]) -> Float[Array, "r s *d"]:
    """Return the mean of the tokens' values under each text's weights, or zeros where all weights are zero."""
    wide = promote_to_float32(values)
    weights = weights.astype(wide.dtype)
    total = jnp.einsum("rts,rt...->rs...", weights, wide, precision=jax.lax.Precision.HIGHEST)
    count = weights.sum(axis=1).reshape(*total.shape[:2], *[1] * (total.ndim - 2))
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0.0)


class MeanPooling(nn.Module):
    """Takes the mean over a text's pooled tokens."""

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_mask: jax.Array, token_info: TokenInfo) -> Float[Array, "r s d"]:
        """Pool each text (arguments: see the top of this file)."""
        return compute_weighted_mean(hidden, segment_mask)


class PositionWeightedMeanPooling(nn.Module):
    """Takes the mean weighted by the position in the text, counted from 1 (SGPT, Muennighoff 2022, arXiv:2202.08904, eq. 2).

    In a causal model, later tokens have seen more of the text.
    """

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_mask: jax.Array, token_info: TokenInfo) -> Float[Array, "r s d"]:
        """Pool each text (arguments: see the top of this file)."""
        return compute_weighted_mean(hidden, segment_mask * (token_info.position + 1)[..., None])


class LastPooling(nn.Module):
    """Takes the last pooled token, which is EOS where the tokenizer appends it."""

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_mask: jax.Array, token_info: TokenInfo) -> Float[Array, "r s d"]:
        """Pool each text (arguments: see the top of this file)."""
        index = jnp.arange(segment_mask.shape[1])[:, None]
        return _take_tokens(hidden, jnp.max(jnp.where(segment_mask, index, -1), axis=1))


class FirstPooling(nn.Module):
    """Takes the first pooled token, which is BOS where the tokenizer adds one and the instruction is pooled too."""

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_mask: jax.Array, token_info: TokenInfo) -> Float[Array, "r s d"]:
        """Pool each text (arguments: see the top of this file)."""
        first = jnp.argmax(segment_mask, axis=1)
        return _take_tokens(hidden, jnp.where(segment_mask.any(axis=1), first, -1))


def _take_tokens(hidden: Float[Array, "r t d"], index: Int[Array, "r s"]) -> Float[Array, "r s d"]:
    """Return the hidden states of the tokens at `index`, with zeros for -1."""
    tokens = jnp.take_along_axis(promote_to_float32(hidden), jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where(index[..., None] >= 0, tokens, 0.0)


class MaxPooling(nn.Module):
    """Takes the maximum of each channel over a text's pooled tokens."""

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_mask: jax.Array, token_info: TokenInfo) -> Float[Array, "r s d"]:
        """Pool each text (arguments: see the top of this file)."""
        # The text that each token is pooled into. Tokens that are not pooled go to an extra text after the last.
        texts = segment_mask.shape[-1]
        text = jnp.where(segment_mask.any(axis=-1), jnp.argmax(segment_mask, axis=-1), texts)
        largest = jax.vmap(lambda h, t: jax.ops.segment_max(h, t, num_segments=texts + 1))(promote_to_float32(hidden), text)
        return jnp.where(segment_mask.any(axis=1)[..., None], largest[:, :texts], 0.0)


class GatedFeedForward(nn.Module):
    """Computes out(value * gelu(gate)), the GEGLU of Shazeer 2020 with biases and the exact GELU.

    Its output is zero before training, because the kernel of `out` starts at zero.
    """

    hidden_width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map each token independently."""
        values_and_gates = Linear(2 * self.hidden_width, ("embed", "mlp"), self.dtype, True, name="in")(x)
        value, gate = jnp.split(values_and_gates, 2, axis=-1)
        out = Linear(x.shape[-1], ("mlp", "embed"), self.dtype, True, init_std=0.0, name="out")
        return out(value * nn.gelu(gate, approximate=False))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, without biases. Its output is zero before training."""

    heads: int
    head_width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Attend from tokens to the context.

        Args:
            x: Tokens, [..., T, D].
            context: What they attend to, [..., C, D].
            mask: True where a token sees an element of the context, [..., T, C]; None: everywhere.

        Returns:
            The output [..., T, D] and the attention weights [..., N, T, C].
        """
        width = self.heads * self.head_width

        def split_heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, self.head_width)

        q = split_heads(Linear(width, ("embed", "pooling_heads"), self.dtype, name="q")(x))
        k, v = jnp.split(Linear(2 * width, ("embed", "pooling_heads"), self.dtype, name="kv")(context), 2, axis=-1)
        scores = promote_to_float32(jnp.einsum("...tnh,...cnh->...ntc", q, split_heads(k))) * self.head_width**-0.5
        if mask is not None:
            scores = jnp.where(mask[..., None, :, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("...ntc,...cnh->...tnh", weights.astype(self.dtype), split_heads(v))
        out = Linear(x.shape[-1], ("pooling_heads", "embed"), self.dtype, init_std=0.0, name="out")
        return out(mixed.reshape(*x.shape[:-1], width)), weights


class LatentAttentionPooling(nn.Module):
    """NV-Embed's latent attention, then the mean (Lee et al. 2024, arXiv:2405.17428, section 3.2).

    By default it computes what the released checkpoints compute. Tokens attend to a trained array of latents through a
    pre-norm residual block with heads as wide as the model. A pre-norm residual GEGLU of four times the width follows. Both
    blocks output zero before training, so that training starts from mean pooling.

    With `paper` it computes equation 1 of the paper, which has no norms, projections, scaling or residuals. The heads are
    then slices of the width, and a two-layer MLP with GELU follows.

    If the collection "intermediates" is mutable, it stores `latent_weights` [R, S, N, L]: the mean attention of a text to
    each latent, per head (appendix C of the paper).

    Attributes:
        latents: Number of latents L.
        heads: Number of heads N.
        paper: Whether to compute equation 1 of the paper instead of what the checkpoints compute.
    """

    latents: int
    heads: int
    paper: bool = False

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_mask: jax.Array, token_info: TokenInfo) -> Float[Array, "r s d"]:
        """Pool each text (arguments: see the top of this file)."""
        width, dtype = hidden.shape[-1], hidden.dtype
        init = nn.with_partitioning(nn.initializers.normal(1.0), ("latents", "embed"))
        latents = self.param("latents", init, (self.latents, width)).astype(dtype)
        if self.paper:
            out, weights = _attend_to_latents(hidden, latents, self.heads)
            inner = nn.gelu(Linear(4 * width, ("embed", "mlp"), dtype, True, name="mlp_in")(out), approximate=False)
            out = Linear(width, ("mlp", "embed"), dtype, True, name="mlp_out")(inner)
        else:
            context = LayerNorm(dtype, name="latent_norm")(latents)
            attention = CrossAttention(self.heads, width, dtype, name="attention")
            mixed, weights = attention(LayerNorm(dtype, name="attention_norm")(hidden), context, None)
            out = hidden + mixed
            out = out + GatedFeedForward(4 * width, dtype, name="mlp")(LayerNorm(dtype, name="mlp_norm")(out))
        if self.is_mutable_collection("intermediates"):
            latent_weights = compute_weighted_mean(jnp.moveaxis(weights, -3, -2), segment_mask)
            self.sow("intermediates", "latent_weights", latent_weights)
        return compute_weighted_mean(out, segment_mask)


def _attend_to_latents(hidden: jax.Array, latents: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """Return softmax(Q K^T) V with Q = hidden and K = V = latents (NV-Embed, equation 1), and the softmax.

    Each head is a slice of the width. Shapes: [R, T, D] and [R, N, T, L].
    """
    q, kv = hidden.reshape(*hidden.shape[:-1], heads, -1), latents.reshape(latents.shape[0], heads, -1)
    weights = jax.nn.softmax(promote_to_float32(jnp.einsum("rtnh,lnh->rntl", q, kv)), axis=-1)
    return jnp.einsum("rntl,lnh->rtnh", weights.astype(hidden.dtype), kv).reshape(hidden.shape), weights


class SelfAttentionPooling(nn.Module):
    """The self-attention baseline of NV-Embed: one more bidirectional block over the text, then the mean.

    Its blocks are those of `LatentAttentionPooling`, with the text's tokens in place of the latents.
    """

    heads: int

    @nn.compact
    def __call__(self, hidden: jax.Array, segment_mask: jax.Array, token_info: TokenInfo) -> Float[Array, "r s d"]:
        """Pool each text (arguments: see the top of this file)."""
        width, dtype = hidden.shape[-1], hidden.dtype
        normed = LayerNorm(dtype, name="attention_norm")(hidden)
        attention = CrossAttention(self.heads, width // self.heads, dtype, name="attention")
        out = hidden + attention(normed, normed, materialize_mask(BIDIRECTIONAL, token_info))[0]
        out = out + GatedFeedForward(4 * width, dtype, name="mlp")(LayerNorm(dtype, name="mlp_norm")(out))
        return compute_weighted_mean(out, segment_mask)


TRAINABLE_POOLINGS = ("latent_attention", "latent_attention_paper", "self_attention")  # those with parameters
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
    """Build the pooling module of a name.

    Args:
        kind: A key of `POOLINGS`.
        latents: Number of latents, for latent attention.
        heads: Number of heads, for latent attention and self-attention.
        name: Key of the module in the parameter tree.
    """
    sizes = {"latents": latents, "heads": heads} if kind.startswith("latent") else {"heads": heads}
    return POOLINGS[kind](name=name, **(sizes if kind in TRAINABLE_POOLINGS else {}))
