"""Quantized vectors with straight-through gradients, for quantization-aware training."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.model.layers import l2_normalize
from jaxembed.search.precision import BYTE_VALUES


def quantize_straight_through(
    vectors: Float[Array, "*b d"], precision: str, ranges: Sequence[Sequence[float]]
) -> Float[Array, "*b d"]:
    """Return the unit vectors of quantized vectors, as `simulate_quantization` does. Zero vectors of absent texts stay zero.

    The gradient is that of the values before rounding (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). It is
    zero where int8 clips a value to its range, and in dimensions that are constant up to rounding errors: their step would
    divide the gradient by almost zero.

    Args:
        vectors: Unit vectors.
        precision: int8 or binary.
        ranges: Lowest and highest value of each dimension, [2, D], for int8.
    """
    is_present = jnp.any(vectors != 0, axis=-1, keepdims=True)
    if precision == "binary":
        signs = jnp.where(vectors > 0, 1.0, -1.0).astype(vectors.dtype) / vectors.shape[-1] ** 0.5
        return jnp.where(is_present, vectors + jax.lax.stop_gradient(signs - vectors), 0)
    starts, ends = jnp.asarray(ranges, vectors.dtype)
    steps = (ends - starts) / (BYTE_VALUES - 1)
    values = jnp.where(steps < jnp.finfo(vectors.dtype).eps, jax.lax.stop_gradient(vectors), vectors)
    exact = jnp.clip((values - starts) / jnp.where(steps == 0, 1, steps), 0, BYTE_VALUES - 1)
    levels = exact + jax.lax.stop_gradient(jnp.floor(exact) - exact)
    return jnp.where(is_present, l2_normalize(levels - BYTE_VALUES // 2), 0)
