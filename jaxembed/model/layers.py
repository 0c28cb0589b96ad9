"""Layers of a decoder: projections, norms, the gated MLP, rotary positions.

Projections work on arrays [R * T, width], because matmuls of two-dimensional arrays are fastest on CPUs.

Letters in shapes: R rows, T tokens per row, S texts (segments) per row, N query heads, G key-value heads, H head width,
D model width, F feed-forward width, V vocabulary, L layers (or latents), B queries, K negatives per query.
Parameters declare logical axes; `jaxembed.devices.mesh` maps them to the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.config import LoraConfig
from jaxembed.model.lora import has_adapter, select_kernel_dtype
from jaxembed.model.matmul import frozen_matmul, sharded_matmul


def promote_to_float32(x: jax.Array) -> jax.Array:
    """Convert 16-bit floats to float32 and keep wider ones: sums over many terms lose too much in 16 bits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Linear(nn.Module):
    """Computes x @ kernel + bias over the last axis, plus the output of a low-rank adapter if `lora` targets it.

    With `lora` the kernel is frozen and stored in `lora.base_dtype`. An int8 kernel has a `kernel_scale` beside it.

    Attributes:
        features: Output width.
        axes: Logical axes of the kernel [in, out]. One of them is "embed", which a mesh may split over `fsdp`.
        dtype: Dtype of the computation.
        use_bias: Whether there is a bias [out].
        init_std: Standard deviation of the initial kernel.
        lora: Adapters of the model, if any.
    """

    features: int
    axes: tuple[str, str]
    dtype: Any
    use_bias: bool = False
    init_std: float = 0.02
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., in] to [..., out]."""
        y = self._apply_kernel(x)
        if self.use_bias:
            bias_init = nn.with_partitioning(nn.initializers.zeros, self.axes[1:])
            # The gradient of a bias is a sum over all tokens, which must be in float32. So the addition is in float32 too.
            y = (promote_to_float32(y) + self.param("bias", bias_init, (self.features,))).astype(self.dtype)
        if self.lora is not None and has_adapter(self.lora, self.name):
            y = y + self._apply_adapter(x, self.lora)
        return y

    def _apply_kernel(self, x: jax.Array) -> jax.Array:
        shape, fsdp_axis = (x.shape[-1], self.features), self.axes.index("embed")
        storage_dtype = select_kernel_dtype(self.lora)
        scale = None
        if storage_dtype == jnp.int8:  # always loaded from a base, so the initial values do not matter
            kernel = self.param("kernel", nn.with_partitioning(nn.initializers.zeros, self.axes), shape, storage_dtype)
            ones = nn.with_partitioning(nn.initializers.ones, self.axes[1:])
            scale = self.param("kernel_scale", ones, shape[1:])
        else:
            init = nn.with_partitioning(nn.initializers.normal(self.init_std), self.axes)
            kernel = self.param("kernel", init, shape, storage_dtype)
        if self.lora is None:
            return sharded_matmul(x, kernel, fsdp_axis)
        # A kernel stored in fewer bits is converted again in the backward pass. Otherwise the forward pass would save the
        # converted kernels of all layers, which together are a copy of the model.
        keeps_dtype = storage_dtype == jnp.float32
        matmul = frozen_matmul if keeps_dtype else jax.checkpoint(frozen_matmul, static_argnums=3)
        return matmul(x, kernel, scale, fsdp_axis)

    def _apply_adapter(self, x: jax.Array, lora: LoraConfig) -> jax.Array:
        """Return (alpha / rank) dropout(x) A B. Dropout is on if the caller passes a "dropout" key."""
        a_init = nn.with_partitioning(nn.initializers.he_uniform(), (self.axes[0], None))
        b_init = nn.with_partitioning(nn.initializers.zeros, (None, self.axes[1]))
        a = self.param("lora_a", a_init, (x.shape[-1], lora.rank)).astype(self.dtype)
        b = self.param("lora_b", b_init, (lora.rank, self.features)).astype(self.dtype)
        return lora.scale * ((nn.Dropout(lora.dropout, deterministic=not self.has_rng("dropout"))(x) @ a) @ b)


class RMSNorm(nn.Module):
    """Computes x / rms(x) * scale over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467), in at least float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis. The output has dtype `dtype`."""
        scale = self.param("scale", nn.with_partitioning(nn.initializers.ones, ("channel",)), (x.shape[-1],))
        wide = promote_to_float32(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (scale * wide).astype(self.dtype)


class LayerNorm(nn.Module):
    """Computes (x - mean) / std * scale + bias over the last axis (Ba et al. 2016, arXiv:1607.06450), in at least float32."""

    dtype: Any
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis. The output has dtype `dtype`."""
        norm = nn.LayerNorm(
            self.epsilon,
            scale_init=nn.with_partitioning(nn.initializers.ones, ("channel",)),
            bias_init=nn.with_partitioning(nn.initializers.zeros, ("channel",)),
            use_fast_variance=False,
        )
        nn.share_scope(self, norm)
        return norm(promote_to_float32(x)).astype(self.dtype)


class GatedMLP(nn.Module):
    """Computes down(silu(gate(x)) * up(x)), the SwiGLU of Shazeer 2020 (arXiv:2002.05202)."""

    hidden_width: int
    dtype: Any
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
        """Map each token independently."""
        gate = Linear(self.hidden_width, ("embed", "mlp"), self.dtype, lora=self.lora, name="gate")(x)
        up = Linear(self.hidden_width, ("embed", "mlp"), self.dtype, lora=self.lora, name="up")(x)
        return Linear(x.shape[-1], ("mlp", "embed"), self.dtype, lora=self.lora, name="down")(nn.silu(gate) * up)


def compute_rope_frequencies(head_width: int, theta: float, scaling: Mapping[str, Any]) -> jax.Array:
    """Return the angle per position of each pair of channels, [H / 2] (RoPE, Su et al. 2021, arXiv:2104.09864).

    Args:
        head_width: Width H of a head.
        theta: Base of the geometric series of frequencies.
        scaling: Scaling as in Hugging Face configs. `rope_type` is "default", "linear" (with `factor`) or "llama3" (with
            `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`).
    """
    # Pair i rotates by theta^(-2i / H) per position: short wavelengths come first, long ones last.
    frequencies = 1.0 / theta ** (jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _scale_frequencies_llama3(frequencies, scaling)
    return frequencies


def _scale_frequencies_llama3(frequencies: jax.Array, scaling: Mapping[str, Any]) -> jax.Array:
    """Scale frequencies as Llama 3.1 does (Hugging Face's `rope_type` "llama3").

    Frequencies of long wavelengths are divided by `factor`, those of short ones stay, and those between are interpolated.
    """
    # Rotations of each pair over the context length of pretraining: many for short wavelengths, below one for the longest.
    rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    # Weight of the unscaled frequency: 0 below `low_freq_factor` rotations, 1 above `high_freq_factor`, linear between.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    unscaled_weight = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
    return frequencies * (unscaled_weight + (1 - unscaled_weight) / scaling["factor"])


def build_rope_table(
    positions: Int[Array, "r t"], frequencies: Float[Array, " half"], dtype: Any
) -> tuple[Float[Array, "r t 1 half"], Float[Array, "r t 1 half"]]:
    """Return the cosines and sines of every token's angles, in at least float32. The axis of length 1 is for the heads.

    They are looked up in a table of positions 0 to T - 1, which is enough because no text is longer than its row. Without the
    table, XLA would compute them again for every head of every layer.
    """
    angles = jnp.arange(positions.shape[-1], dtype=frequencies.dtype)[:, None] * frequencies
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.cos(angles).astype(wide)[positions, None], jnp.sin(angles).astype(wide)[positions, None]


def apply_rope(x: Float[Array, "r t n h"], cos: jax.Array, sin: jax.Array) -> Float[Array, "r t n h"]:
    """Rotate channel i together with channel i + H / 2, the layout of Hugging Face checkpoints."""
    first, second = jnp.split(promote_to_float32(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def l2_normalize(x: Float[Array, "*b d"], floor: float = 1e-12) -> Float[Array, "*b d"]:
    """Return x / |x|. A zero vector stays zero, with a zero gradient (jnp.linalg.norm would give NaN)."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, floor**2))
