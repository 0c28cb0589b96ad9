"""The attention layer of a transformer: grouped-query attention over packed rows, by a kernel of `model/kernels.py`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxembed.config import LoraConfig
from jaxembed.model.kernels import pick_dropout_kernel, pick_kernel
from jaxembed.model.layers import Linear, apply_rope, make_norm
from jaxembed.model.masks import Mask, TokenInfo
from jaxembed.model.remat import ATTENTION_OUTPUT


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), with rotary positions (Su et al. 2021) or without.

    Attributes:
        heads: Number of query heads N.
        kv_heads: Number of key-value heads G, a divisor of N.
        head_width: Width H of a head.
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has a bias.
        qk_norm: Whether queries and keys are normalized over H, as in Qwen3.
        norm: Kind of these norms.
        norm_epsilon: Epsilon of these norms.
        query_scale: Factor of the scores; None: 1 / sqrt(H).
        windows: The distinct sliding windows of all layers.
        mask: Which tokens of a text attend to each other.
        dtype: Dtype of the computation.
        kernel: Name of the kernel (`model.attention_kernel`).
        dropout: Dropout rate of the attention weights. It is on if the caller passes a "dropout" key.
        lora: Adapters of the projections, if any.
    """

    heads: int
    kv_heads: int
    head_width: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    norm: str
    norm_epsilon: float
    query_scale: float | None
    windows: tuple[int, ...]
    mask: Mask
    dtype: Any
    kernel: str
    dropout: float = 0.0
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "tokens d"],
        token_info: TokenInfo,
        rope: tuple[jax.Array, jax.Array] | None,
        window: jax.Array | int | None,
        shards: int,
    ) -> Float[Array, "tokens d"]:
        """Mix the tokens of each text.

        Args:
            x: Normalized hidden states, [R * T, D].
            token_info: Segments and positions of the tokens, [R, T] each.
            rope: Cosines and sines of `build_rope_table`; None without rotary positions.
            window: Sliding window of this layer in tokens, or None.
            shards: Number of equal parts into which the rows are split over devices.
        """

        def project(name: str, heads: int, axis: str) -> jax.Array:
            linear = Linear(heads * self.head_width, ("embed", axis), self.dtype, self.qkv_bias, lora=self.lora, name=name)
            return linear(x).reshape(*token_info.segment.shape, heads, self.head_width)

        q, k = project("q", self.heads, "heads"), project("k", self.kv_heads, "kv_heads")
        v = project("v", self.kv_heads, "kv_heads")
        if self.qk_norm:
            q = make_norm(self.norm, self.norm_epsilon, self.dtype, "q_norm")(q)
            k = make_norm(self.norm, self.norm_epsilon, self.dtype, "k_norm")(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if self.query_scale is not None:  # the kernels divide by sqrt(H)
            q = q * jnp.asarray(self.query_scale * self.head_width**0.5, q.dtype)
        attend = pick_kernel(self.kernel, shards, self.windows)
        if self.dropout and self.has_rng("dropout"):
            attend = pick_dropout_kernel(self.kernel, shards, self.dropout, self.make_rng("dropout"))
        mixed = attend(q, k, v, token_info, self.mask, window)
        mixed = checkpoint_name(mixed, ATTENTION_OUTPUT)
        out = Linear(x.shape[-1], ("heads", "embed"), self.dtype, self.out_bias, lora=self.lora, name="out")
        return out(mixed.reshape(x.shape[0], -1))
