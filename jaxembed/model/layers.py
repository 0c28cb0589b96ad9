"""The small pieces of a decoder layer. Projections work on [tokens, width]: two dimensions, the fast shape on CPUs.

Letters in shapes: R rows, T tokens a row, S texts (segments) a row, N query heads, G key-value heads, H head width,
D model width, F feed-forward width, V vocabulary, L layers (or latents), B queries, K negatives a query.
Parameters declare their logical axes; `jaxembed.devices.mesh` maps those to the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.model.lora import LoRA
from jaxembed.model.matmul import frozen_product, product


def at_least_float32(x: jax.Array) -> jax.Array:
    """The array in float32, or in float64 if it already is: sums over many terms lose too much in 16 bits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Linear(nn.Module):
    """x @ kernel + bias over the last axis, computed in `dtype`; with low-rank adapters where `lora` has this name.

    Under `lora` the kernel is frozen and held as it says: in int8 there is a `kernel_scale` beside it.
    """

    features: int
    axes: tuple[str, str]
    dtype: Any
    use_bias: bool = False
    init_std: float = 0.02
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._product(x)
        if self.use_bias:
            bias_init = nn.with_partitioning(nn.initializers.zeros, self.axes[1:])
            # The gradient of a bias or a scale is a sum over all tokens: what is summed must be in float32
            y = (at_least_float32(y) + self.param("bias", bias_init, (self.features,))).astype(self.dtype)
        if self.lora is not None and self.lora.adapts(self.name):
            y = y + self._adapted(x, self.lora)
        return y

    def _product(self, x: jax.Array) -> jax.Array:
        shape, split = (x.shape[-1], self.features), self.axes.index("embed")
        held = jnp.dtype("float32" if self.lora is None else self.lora.base_dtype)
        if held == jnp.int8:  # read from a base: never drawn
            kernel = self.param("kernel", nn.with_partitioning(nn.initializers.zeros, self.axes), shape, held)
            ones = nn.with_partitioning(nn.initializers.ones, self.axes[1:])
            scale = self.param("kernel_scale", ones, shape[1:])
        else:
            init = nn.with_partitioning(nn.initializers.normal(self.init_std), self.axes)
            kernel, scale = self.param("kernel", init, shape, held), None
        if self.lora is None:
            return product(x, kernel, split)
        # The backward pass converts such a kernel again: those of all layers, kept from the forward pass, would be a copy
        multiply = frozen_product if held == jnp.float32 else jax.checkpoint(frozen_product, static_argnums=3)
        return multiply(x, kernel, scale, split)

    def _adapted(self, x: jax.Array, lora: LoRA) -> jax.Array:
        into = nn.with_partitioning(nn.initializers.he_uniform(), (self.axes[0], None))
        out = nn.with_partitioning(nn.initializers.zeros, (None, self.axes[1]))
        a = self.param("lora_a", into, (x.shape[-1], lora.rank)).astype(self.dtype)
        b = self.param("lora_b", out, (lora.rank, self.features)).astype(self.dtype)
        return lora.scale * ((nn.Dropout(lora.dropout, deterministic=lora.deterministic)(x) @ a) @ b)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich 2019), in at least float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_partitioning(nn.initializers.ones, ("channel",)), (x.shape[-1],))
        wide = at_least_float32(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (scale * wide).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * scale + bias over the last axis (Ba et al. 2016), in at least float32."""

    dtype: Any
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.LayerNorm(
            self.epsilon,
            scale_init=nn.with_partitioning(nn.initializers.ones, ("channel",)),
            bias_init=nn.with_partitioning(nn.initializers.zeros, ("channel",)),
            use_fast_variance=False,
        )
        nn.share_scope(self, norm)
        return norm(at_least_float32(x)).astype(self.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020."""

    hidden: int
    dtype: Any
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
        gate = Linear(self.hidden, ("embed", "mlp"), self.dtype, lora=self.lora, name="gate")(x)
        up = Linear(self.hidden, ("embed", "mlp"), self.dtype, lora=self.lora, name="up")(x)
        return Linear(x.shape[-1], ("mlp", "embed"), self.dtype, lora=self.lora, name="down")(nn.silu(gate) * up)


def rope_frequencies(head_width: int, theta: float, scaling: Mapping[str, Any]) -> jax.Array:
    """[H/2] angle per position of each pair of channels (Su et al. 2021), scaled as Hugging Face configs say.

    `scaling` holds `rope_type`: default, linear (with factor) or llama3 (factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings).
    """
    frequencies = 1.0 / theta ** (jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: jax.Array, scaling: Mapping[str, Any]) -> jax.Array:
    """Llama 3.1's blend: long waves are slowed by the factor, short ones kept, those between interpolated."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rope_table(
    positions: Int[Array, "r t"], frequencies: Float[Array, " half"], dtype: Any
) -> tuple[Float[Array, "r t 1 half"], Float[Array, "r t 1 half"]]:
    """Cosine and sine of each token's angles, with a heads axis of one; angles in at least float32.

    They are looked up among those of positions below T, which are all, as no text is longer than its row: XLA would compute
    them anew for every head of every layer.
    """
    angles = jnp.arange(positions.shape[-1], dtype=frequencies.dtype)[:, None] * frequencies
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.cos(angles).astype(wide)[positions, None], jnp.sin(angles).astype(wide)[positions, None]


def rotate(x: Float[Array, "r t n h"], cos: jax.Array, sin: jax.Array) -> Float[Array, "r t n h"]:
    """Rotates channel i with channel i + H/2, the layout of Hugging Face checkpoints."""
    first, second = jnp.split(at_least_float32(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def unit_length(x: Float[Array, "*b d"], floor: float = 1e-12) -> Float[Array, "*b d"]:
    """x / |x|; zero stays zero, with a zero gradient (a plain norm would give NaN there)."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, floor**2))
