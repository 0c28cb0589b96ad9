"""The attention layer of a decoder: grouped queries over packed rows, computed by one of the kernels of `model/kernels.py`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxembed.config import LoraConfig
from jaxembed.model.kernels import pick_kernel
from jaxembed.model.layers import Linear, RMSNorm, apply_rope
from jaxembed.model.masks import Mask, TokenInfo


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions (Su et al. 2021).

    Attributes:
        heads: Number of query heads N.
        kv_heads: Number of key-value heads G, a divisor of N.
        head_width: Width H of a head.
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has a bias.
        qk_norm: Whether queries and keys pass an RMSNorm over H, as in Qwen3.
        norm_epsilon: Epsilon of these norms.
        mask: Which tokens of a text see each other.
        dtype: Dtype of the computation.
        kernel: Name of the kernel (`model.attention_kernel`).
        lora: Adapters of the projections, if any.
    """

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
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "tokens d"],
        token_info: TokenInfo,
        rope: tuple[jax.Array, jax.Array],
        window: jax.Array | int | None,
        shards: int,
    ) -> Float[Array, "tokens d"]:
        """Mix the tokens of each text.

        Args:
            x: Normalized hidden states, [R * T, D].
            token_info: Segments and positions of the tokens, [R, T] each.
            rope: Cosines and sines of `build_rope_table`.
            window: Sliding window of this layer in tokens, or None.
            shards: Number of equal parts in which the rows are split over devices.
        """

        def project(name: str, heads: int, axis: str) -> jax.Array:
            linear = Linear(heads * self.head_width, ("embed", axis), self.dtype, self.qkv_bias, lora=self.lora, name=name)
            return linear(x).reshape(*token_info.segment.shape, heads, self.head_width)

        q, k = project("q", self.heads, "heads"), project("k", self.kv_heads, "kv_heads")
        v = project("v", self.kv_heads, "kv_heads")
        if self.qk_norm:
            q = RMSNorm(self.norm_epsilon, self.dtype, name="q_norm")(q)
            k = RMSNorm(self.norm_epsilon, self.dtype, name="k_norm")(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        mixed = pick_kernel(self.kernel, shards)(q, k, v, token_info, self.mask, window)
        out = Linear(x.shape[-1], ("heads", "embed"), self.dtype, self.out_bias, lora=self.lora, name="out")
        return out(mixed.reshape(x.shape[0], -1))
