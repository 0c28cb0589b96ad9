"""x @ kernel, where a kernel is held in another precision than it is computed in, and may be split over devices (`fsdp`).

A kernel is converted where it lies and fetched then: half the bytes in 16 bits. The gradient of one that is trained is summed
over devices in the kernel's own precision, each device getting the sum of the part that it holds. Left to itself, XLA
may send whole gradients to all devices, summed in 16 bits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxembed.devices import blas
from jaxembed.devices.collectives import all_gather_fsdp, has_sharded_parameters, reduce_scatter_sum


def product(x: Float[Array, "*t i"], kernel: Float[Array, "i o"], axis: int) -> Float[Array, "*t o"]:
    """x @ kernel in the dtype of x; `axis` of the kernel is the one that may be split."""
    if has_sharded_parameters():
        return _split(axis, x, kernel)
    return _multiplied(x, kernel.astype(x.dtype))


def frozen_product(
    x: Float[Array, "*t i"], kernel: Shaped[Array, "i o"], scale: Float[Array, " o"] | None, axis: int
) -> Float[Array, "*t o"]:
    """The same with a kernel that has no gradient, maybe of int8 numbers, which are exact in any dtype of x: their scales,
    common factors of the sums, come after.
    """
    y = _multiplied(x, all_gather_fsdp(kernel.astype(x.dtype), axis))
    return y if scale is None else (y * scale).astype(x.dtype)


def _multiplied(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return blas.product(x, kernel) if blas.multiplies(x, kernel) else x @ kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split(axis: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ all_gather_fsdp(kernel.astype(x.dtype), axis)


def _forward(axis: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _split(axis, x, kernel), (x, kernel)


def _backward(axis: int, kept: tuple[jax.Array, jax.Array], of_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    of_x = of_y @ all_gather_fsdp(kernel.astype(x.dtype), axis).T
    of_kernel = functools.partial(jnp.einsum, "...i,...o->io", preferred_element_type=kernel.dtype)
    return of_x, reduce_scatter_sum(of_kernel, axis, x, of_y)


_split.defvjp(_forward, _backward)
