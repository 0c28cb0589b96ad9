"""A decoder-only transformer over packed rows: embedding, stacked pre-norm layers, final norm.

It has no language-model head and no key-value cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config import LoraConfig
from jaxembed.data.packing import PackedTexts
from jaxembed.devices.collectives import embedding_lookup, shard_rows
from jaxembed.model.attention import Attention
from jaxembed.model.families import DecoderConfig
from jaxembed.model.layers import GatedMLP, RMSNorm, build_rope_table, compute_rope_frequencies
from jaxembed.model.lora import select_embedding_dtype
from jaxembed.model.masks import Mask, TokenInfo


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """How a decoder is executed. These options change its outputs by rounding errors only.

    Attributes:
        dtype: Dtype of the computation.
        remat: Whether the backward pass recomputes the activations of a layer, to save memory.
        unroll: Whether the loop over the layers is unrolled. Steps are faster, compilation takes longer.
        attention_kernel: Name of the attention kernel (see `pick_kernel`).
    """

    dtype: Any = jnp.float32
    remat: bool = False
    unroll: bool = True
    attention_kernel: str = "auto"


class DecoderLayer(nn.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig
    mask: Mask
    compute: ComputeOptions
    shards: int
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x: jax.Array, token_info: TokenInfo, rope: Any, window: Any) -> tuple[jax.Array, None]:
        """Map hidden states [R * T, D] to those after this layer. `nn.scan` needs the second output, None.

        See `Attention` for `token_info`, `rope` and `window`.
        """
        c, dtype = self.config, self.compute.dtype
        attention = Attention(
            heads=c.heads, kv_heads=c.kv_heads, head_width=c.head_width, qkv_bias=c.qkv_bias, out_bias=c.out_bias,
            qk_norm=c.qk_norm, norm_epsilon=c.norm_epsilon, mask=self.mask, dtype=dtype,
            kernel=self.compute.attention_kernel, lora=self.lora, name="attention",
        )  # fmt: skip
        normed = RMSNorm(c.norm_epsilon, dtype, name="attention_norm")(x)
        x = x + attention(normed, token_info, rope, window, self.shards)
        x = x + GatedMLP(c.mlp_width, dtype, self.lora, name="mlp")(RMSNorm(c.norm_epsilon, dtype, name="mlp_norm")(x))
        return shard_rows(x), None


class Decoder(nn.Module):
    """Maps packed texts to hidden states [R, T, D] after the final norm, in the dtype of the computation."""

    config: DecoderConfig
    mask: Mask
    compute: ComputeOptions = ComputeOptions()
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, texts: PackedTexts) -> Float[Array, "r t d"]:
        """Return the hidden states of all tokens."""
        c, dtype = self.config, self.compute.dtype
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab_size, c.width), select_embedding_dtype(self.lora))
        x = embedding_lookup(table, texts.tokens.reshape(-1), dtype)
        frequencies = compute_rope_frequencies(c.head_width, c.rope_theta, dict(c.rope_scaling))
        rope = build_rope_table(texts.positions, frequencies, dtype)
        token_info = TokenInfo(texts.segment_ids, texts.positions, texts.pool_mask)
        # Windows that differ between layers become an array [L], which `nn.scan` slices. There, a layer without a window gets
        # one as long as the longest text. A window that all layers share stays a Python int: some kernels need a static one.
        is_mixed = len(set(c.windows)) > 1
        window = jnp.array([w or c.max_positions for w in c.windows]) if is_mixed else next(iter(c.windows), None)
        layer = DecoderLayer
        if self.compute.remat:
            layer = nn.remat(DecoderLayer, prevent_cse=False, static_argnums=() if is_mixed else (4,))  # 4: window
        stack = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},  # "intermediates" is for `capture_intermediates`
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0 if is_mixed else nn.broadcast),
            length=c.layers,
            unroll=c.layers if self.compute.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(c, self.mask, self.compute, texts.shards, self.lora, name="layers")(x, token_info, rope, window)
        x = RMSNorm(c.norm_epsilon, dtype, name="norm")(x)
        return x.reshape(*texts.tokens.shape, c.width)
