"""A decoder-only transformer over packed rows: embedding, stacked pre-norm layers, final norm. No head, no cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.data.packing import PackedTexts
from jaxembed.devices.collectives import embedding_lookup, shard_rows
from jaxembed.model.attention import Attention
from jaxembed.model.families import DecoderConfig
from jaxembed.model.layers import GatedMLP, RMSNorm, rope_frequencies, rope_table
from jaxembed.model.lora import LoRA
from jaxembed.model.masks import Mask, TokenInfo


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the decoder runs; none of it changes what it computes beyond rounding."""

    dtype: Any = jnp.float32
    remat: bool = False
    unroll: bool = True
    attention_kernel: str = "auto"


class DecoderLayer(nn.Module):
    config: DecoderConfig
    mask: Mask
    compute: Compute
    shards: int
    lora: LoRA | None

    @nn.compact
    def __call__(self, x: jax.Array, places: TokenInfo, rope: Any, window: Any) -> tuple[jax.Array, None]:
        c, dtype = self.config, self.compute.dtype
        attention = Attention(
            c.heads, c.kv_heads, c.head_width, c.qkv_bias, c.out_bias, c.qk_norm, c.norm_epsilon, self.mask, dtype,
            self.compute.attention_kernel, self.lora, name="attention",
        )  # fmt: skip
        normed = RMSNorm(c.norm_epsilon, dtype, name="attention_norm")(x)
        x = x + attention(normed, places, rope, window, self.shards)
        x = x + GatedMLP(c.mlp_width, dtype, self.lora, name="mlp")(RMSNorm(c.norm_epsilon, dtype, name="mlp_norm")(x))
        x = shard_rows(x)
        self.sow("intermediates", "hidden", x)
        return x, None


class Decoder(nn.Module):
    """Hidden states [R, T, D] of packed texts, after the final norm, in the compute dtype."""

    config: DecoderConfig
    mask: Mask
    compute: Compute = Compute()
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, texts: PackedTexts) -> Float[Array, "r t d"]:
        c, dtype = self.config, self.compute.dtype
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        held = jnp.float32 if self.lora is None else self.lora.embedding_dtype
        table = self.param("embedding", init, (c.vocab_size, c.width), held)
        x = embedding_lookup(table, texts.tokens.reshape(-1), dtype)
        rope = rope_table(texts.positions, rope_frequencies(c.head_width, c.rope_theta, dict(c.rope_scaling)), dtype)
        places = TokenInfo(texts.segment_ids, texts.positions, texts.pool_mask)
        mixed = len(set(c.windows)) > 1  # then a window is an array over the layers, without limit where there is none
        window = jnp.array([w or c.max_positions for w in c.windows]) if mixed else next(iter(c.windows), None)
        layer = DecoderLayer
        if self.compute.remat:  # one window of all layers (argument 4) stays a number, which kernels need
            layer = nn.remat(DecoderLayer, prevent_cse=False, static_argnums=() if mixed else (4,))
        stack = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0 if mixed else nn.broadcast),
            length=c.layers,
            unroll=c.layers if self.compute.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(c, self.mask, self.compute, texts.shards, self.lora, name="layers")(x, places, rope, window)
        x = RMSNorm(c.norm_epsilon, dtype, name="norm")(x)
        return x.reshape(*texts.tokens.shape, c.width)
