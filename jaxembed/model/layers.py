"""Layers of a transformer: projections, norms, the MLP, rotary positions.

Projections take arrays [R * T, width], because two-dimensional matmuls are fastest on CPUs.

Letters in shapes: R rows, T tokens per row, S texts (segments) per row, N query heads, G key-value heads, H head width,
D model width, F feed-forward width, V vocabulary, L layers (or latents), B queries, K negatives per query.
Parameters declare logical axes; `jaxembed.devices.mesh` maps them to the mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxembed.config import LoraConfig
from jaxembed.model.lora import has_adapter, select_kernel_dtype
from jaxembed.model.matmul import frozen_matmul, sharded_matmul
from jaxembed.model.remat import MATMUL_OUTPUT


def promote_to_float32(x: jax.Array) -> jax.Array:
    """Convert 16-bit floats to float32 and keep wider ones: sums over many terms lose too much precision in 16 bits."""
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
        return checkpoint_name(y, MATMUL_OUTPUT)

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
        return lora.scale * ((make_dropout(self, lora.dropout)(x) @ a) @ b)


def make_dropout(module: nn.Module, rate: float) -> nn.Dropout:
    """Build the dropout of a module (Srivastava et al. 2014). It is on if the caller of the model passes a "dropout" key."""
    return nn.Dropout(rate, deterministic=not module.has_rng("dropout"))


class RMSNorm(nn.Module):
    """Computes x / rms(x) * (offset + scale) over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    At least in float32.

    Attributes:
        epsilon: Epsilon of the norm.
        dtype: Dtype of the output.
        offset: 0, or 1 where the scale is stored as its difference from 1, as in Gemma.
    """

    epsilon: float
    dtype: Any
    offset: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis. The output has dtype `dtype`."""
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", nn.with_partitioning(init, ("channel",)), (x.shape[-1],))
        wide = promote_to_float32(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return ((self.offset + scale if self.offset else scale) * wide).astype(self.dtype)


class LayerNorm(nn.Module):
    """Computes (x - mean) / std * scale + bias over the last axis (Ba et al. 2016, arXiv:1607.06450), in at least float32."""

    dtype: Any
    epsilon: float = 1e-5
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis. The output has dtype `dtype`."""
        norm = nn.LayerNorm(
            self.epsilon,
            scale_init=nn.with_partitioning(nn.initializers.ones, ("channel",)),
            bias_init=nn.with_partitioning(nn.initializers.zeros, ("channel",)),
            use_bias=self.use_bias,
            use_fast_variance=False,
        )
        nn.share_scope(self, norm)
        return norm(promote_to_float32(x)).astype(self.dtype)


def make_norm(kind: str, epsilon: float, dtype: Any, name: str) -> nn.Module:
    """Build the norm of a kind (`TransformerConfig.norm`).

    Args:
        kind: "rms", "rms_offset" (the scale is stored as its difference from 1), "layer", or "layer_unbiased".
        epsilon: Epsilon of the norm.
        dtype: Dtype of the output.
        name: Key of the module in the parameter tree.
    """
    if kind.startswith("rms"):
        return RMSNorm(epsilon, dtype, offset=int(kind == "rms_offset"), name=name)
    return LayerNorm(dtype, epsilon, use_bias=kind == "layer", name=name)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "silu": nn.silu,
        "gelu": functools.partial(nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(nn.gelu, approximate=True),
        "relu": nn.relu,
    }
)


class MLP(nn.Module):
    """Computes down(activation(up(x))), or down(activation(gate(x)) * up(x)) if gated (GLU, Shazeer 2020, arXiv:2002.05202).

    Attributes:
        hidden_width: Width F of the hidden layer.
        dtype: Dtype of the computation.
        activation: Key of `ACTIVATIONS`.
        is_gated: Whether there is a gate.
        use_bias: Whether the projections have a bias.
        lora: Adapters of the projections, if any.
    """

    hidden_width: int
    dtype: Any
    activation: str = "silu"
    is_gated: bool = True
    use_bias: bool = False
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "tokens d"], is_text: Bool[Array, " tokens"] | None = None) -> Float[Array, "tokens d"]:
        """Map each token independently.

        If the collection "intermediates" is mutable, it stores `hidden_squares` [F]: the sum of the squared hidden activations
        over the tokens where `is_text`.
        """

        def project(name: str, y: jax.Array, features: int, axes: tuple[str, str]) -> jax.Array:
            return Linear(features, axes, self.dtype, self.use_bias, lora=self.lora, name=name)(y)

        activate, axes = ACTIVATIONS[self.activation], ("embed", "mlp")
        if self.is_gated:
            gate = project("gate", x, self.hidden_width, axes)
            hidden = activate(gate) * project("up", x, self.hidden_width, axes)
        else:
            hidden = activate(project("up", x, self.hidden_width, axes))
        if is_text is not None and self.is_mutable_collection("intermediates"):
            squares = jnp.where(is_text[:, None], jnp.square(promote_to_float32(hidden)), 0)
            self.sow("intermediates", "hidden_squares", jnp.sum(squares, axis=0))
        return project("down", hidden, x.shape[-1], ("mlp", "embed"))


def compute_rope_frequencies(head_width: int, theta: float, scaling: Mapping[str, Any]) -> jax.Array:
    """Return the angle per position of each pair of channels, [H / 2] (RoPE, Su et al. 2021, arXiv:2104.09864).

    Args:
        head_width: Width H of a head.
        theta: Base of the geometric series of frequencies.
        scaling: `rope_type` and its parameters, as in Hugging Face configs (see `ROPE_SCALING_KEYS` and `OPTIONAL_ROPE_KEYS`
            in `formats/hf_config.py`). Empty: no scaling.
    """
    # Pair i rotates by theta^(-2i / H) per position: short wavelengths come first, long ones last.
    frequencies = 1.0 / theta ** (jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _scale_frequencies_llama3(frequencies, scaling)
    if kind == "yarn":
        return _scale_frequencies_yarn(frequencies, theta, scaling)
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


def _scale_frequencies_yarn(frequencies: jax.Array, theta: float, scaling: Mapping[str, Any]) -> jax.Array:
    """Scale frequencies as YaRN does (Peng et al. 2023, arXiv:2309.00071, section 3.2), like Hugging Face.

    Pairs with fewer than `beta_slow` rotations over the original context are interpolated (divided by `factor`), those with
    more than `beta_fast` stay, and those between are mixed.
    """
    pairs = len(frequencies)

    def find_pair(rotations: float) -> float:
        """Return the (fractional) index of the pair that rotates this often over the original context."""
        wavelength = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return pairs * math.log(wavelength) / math.log(theta)

    first, last = find_pair(scaling.get("beta_fast", 32.0)), find_pair(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first or 0.001
    interpolated_weight = jnp.clip((jnp.arange(pairs, dtype=frequencies.dtype) - first) / width, 0.0, 1.0)
    return frequencies * (1 - interpolated_weight + interpolated_weight / scaling["factor"])


def compute_rope_magnitude(scaling: Mapping[str, Any]) -> float:
    """Return the factor of the cosines and sines: YaRN's `attention_factor` (its equation 22), otherwise 1."""
    if scaling.get("rope_type") != "yarn":
        return 1.0

    def grow(weight: float) -> float:
        return 0.1 * weight * math.log(max(scaling["factor"], 1.0)) + 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return grow(scaling["mscale"]) / grow(scaling["mscale_all_dim"])
    return grow(1.0)


def build_rope_table(
    positions: Int[Array, "r t"], frequencies: Float[Array, " half"], dtype: Any
) -> tuple[Float[Array, "r t 1 half"], Float[Array, "r t 1 half"]]:
    """Return the cosines and sines of every token's angles, in at least float32. The axis of length 1 is for the heads.

    They are looked up in a table of positions 0 to T - 1, because no text is longer than its row. Without the table, XLA
    would recompute them for every head of every layer.
    """
    angles = jnp.arange(positions.shape[-1], dtype=frequencies.dtype)[:, None] * frequencies
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.cos(angles).astype(wide)[positions, None], jnp.sin(angles).astype(wide)[positions, None]


def apply_rope(x: Float[Array, "r t n h"], cos: jax.Array, sin: jax.Array) -> Float[Array, "r t n h"]:
    """Rotate channel i together with channel i + H / 2, the layout of Hugging Face checkpoints."""
    first, second = jnp.split(promote_to_float32(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def l2_normalize(x: Float[Array, "*b d"], floor: float = 1e-12) -> Float[Array, "*b d"]:
    """Return x / |x|. A zero vector stays zero, and its gradient is finite (jnp.linalg.norm would give NaN)."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, floor**2))
