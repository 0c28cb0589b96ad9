"""Kernels of a frozen base, held in fewer bits than they are computed with: bfloat16, or int8 with a scale an output channel.

Adapters on a quantised base are the idea of QLoRA (Dettmers et al. 2023). Theirs is a 4-bit type with quantised scales of
blocks; ours is plain symmetric int8, scaled by the largest number of each output channel.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

INT8_MAX = 127


def quantize(kernel: Float32[np.ndarray, "i o"]) -> tuple[Int8[np.ndarray, "i o"], Float32[np.ndarray, " o"]]:
    """(int8 numbers, scale of each output channel): their product is the kernel to within half a scale."""
    scale = np.abs(kernel).max(axis=0) / INT8_MAX
    return np.rint(kernel / np.where(scale > 0, scale, 1)).astype(np.int8), scale


def dequantize(kernel: Int8[Array, "*l i o"], scale: Float[Array, "*l o"]) -> Float[Array, "*l i o"]:
    """The kernel in float32."""
    return kernel.astype(jnp.float32) * scale[..., None, :]
