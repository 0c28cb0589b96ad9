"""Matmuls x @ kernel for kernels that may be stored in another dtype than x, and sharded over `fsdp`.

A kernel is converted to the dtype of x before it is gathered: in 16 bits, devices send half the bytes. The gradient of a
trained kernel is summed over devices in the kernel's own dtype, and each device receives only the sum of its own shard.
Without this module XLA may send whole gradients to all devices, summed in 16 bits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxembed.devices import bfloat16, blas
from jaxembed.devices.collectives import all_gather_fsdp, has_sharded_parameters, reduce_scatter_sum


def sharded_matmul(x: Float[Array, "*t i"], kernel: Float[Array, "i o"], fsdp_axis: int) -> Float[Array, "*t o"]:
    """Return x @ kernel for a trained kernel, in the dtype of x. `fsdp` may split the axis `fsdp_axis` of the kernel."""
    if has_sharded_parameters():
        return _gather_and_multiply(fsdp_axis, x, kernel)
    return _multiply(x, kernel)


def frozen_matmul(
    x: Float[Array, "*t i"], kernel: Shaped[Array, "i o"], scale: Float[Array, " o"] | None, fsdp_axis: int
) -> Float[Array, "*t o"]:
    """Return x @ (kernel * scale) for a kernel without gradient, in the dtype of x.

    int8 values are exact in every dtype of x. The scale of an output channel is a common factor, applied after the sum.
    """
    y = _multiply(x, all_gather_fsdp(kernel.astype(x.dtype), fsdp_axis))
    return y if scale is None else (y * scale).astype(x.dtype)


def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel in the dtype of x."""
    if bfloat16.is_worthwhile(x, kernel):
        return bfloat16.matmul(x, kernel)
    kernel = kernel.astype(x.dtype)
    return blas.matmul(x, kernel) if blas.is_worthwhile(x, kernel) else x @ kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_and_multiply(fsdp_axis: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel, with a backward pass that keeps the kernel's gradient sharded and in the kernel's dtype."""
    return x @ all_gather_fsdp(kernel.astype(x.dtype), fsdp_axis)


def _forward(fsdp_axis: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The shard is saved, not the gathered kernel: the backward pass gathers it again.
    return _gather_and_multiply(fsdp_axis, x, kernel), (x, kernel)


def _backward(fsdp_axis: int, residuals: tuple[jax.Array, jax.Array], y_grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    # dx = dy @ kernel^T, with the whole kernel in the dtype of x.
    x_grad = y_grad @ all_gather_fsdp(kernel.astype(x.dtype), fsdp_axis).T
    # dkernel = x^T @ dy: every device multiplies its own tokens and accumulates in the kernel's dtype. A reduce-scatter sums
    # these over devices and leaves each device the shard that it stores.
    multiply_tokens = functools.partial(jnp.einsum, "...i,...o->io", preferred_element_type=kernel.dtype)
    return x_grad, reduce_scatter_sum(multiply_tokens, fsdp_axis, x, y_grad)


_gather_and_multiply.defvjp(_forward, _backward)
