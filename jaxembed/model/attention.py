"""The attention layer of a decoder: grouped queries over packed rows, by one of the kernels of `model/kernels.py`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxembed.model.kernels import pick_kernel
from jaxembed.model.layers import Linear, RMSNorm, rotate
from jaxembed.model.lora import LoRA
from jaxembed.model.masks import Mask, TokenInfo


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
        places: TokenInfo,
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
