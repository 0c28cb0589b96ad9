"""Quantization of the kernels of a frozen base: int8 with a scale per output channel.

Adapters on a quantized base are the idea of QLoRA (Dettmers et al. 2023, arXiv:2305.14314). QLoRA has a 4-bit type and
quantizes the scales of its blocks. This is plain symmetric int8: the largest absolute value of a channel becomes 127.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

INT8_MAX = 127


def quantize(kernel: Float32[np.ndarray, "i o"]) -> tuple[Int8[np.ndarray, "i o"], Float32[np.ndarray, " o"]]:
    """Return the int8 kernel and a scale per output channel. Their product differs from `kernel` by at most half a scale."""
    scale = np.abs(kernel).max(axis=0) / INT8_MAX
    return np.rint(kernel / np.where(scale > 0, scale, 1)).astype(np.int8), scale


def dequantize(kernel: Int8[Array, "*l i o"], scale: Float[Array, "*l o"]) -> Float[Array, "*l i o"]:
    """Return kernel * scale in float32. Axes before the last two, such as the layers, are batch axes."""
    return kernel.astype(jnp.float32) * scale[..., None, :]
