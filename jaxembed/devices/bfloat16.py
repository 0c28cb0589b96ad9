"""Compute large bfloat16 matmuls on CPUs by XLA's kernels for bfloat16, which sum in float32.

With instructions for bfloat16 (AVX512-BF16, AMX) these kernels take about half the time of float32. XLA uses them only for a
float32 result, and only if the sum runs over the last axis of the first operand. Otherwise it converts both operands to
float32, which takes longer than float32 alone. So every matmul here has that form, and is rounded to bfloat16 afterwards.

`jaxembed.devices.cpu` documents the switch that turns this off.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from jaxembed.devices.blas import is_large_on_one_cpu
from jaxembed.devices.cpu import is_tuned

CPU_INFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = {"avx512_bf16", "amx_bf16"}


def has_fast_matmuls() -> bool:
    """Return whether JAX runs on CPUs that are tuned and have instructions for bfloat16."""
    return is_tuned(jax.default_backend()) and not INSTRUCTION_SETS.isdisjoint(_list_cpu_flags())


@functools.cache
def _list_cpu_flags() -> frozenset[str]:
    """Return the features of the first CPU, as Linux names them. None are known on other systems."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def is_worthwhile(x: jax.Array, kernel: jax.Array) -> bool:
    """Return whether `matmul` should compute `x @ kernel`: large matrices, x in bfloat16, on a CPU that is a single device."""
    return x.dtype == jnp.bfloat16 and is_large_on_one_cpu(x, kernel)


@jax.custom_vjp
def matmul(x: BFloat16[Array, "t i"], kernel: Float[Array, "i o"]) -> BFloat16[Array, "t o"]:
    """Compute `x @ kernel` in bfloat16.

    The kernel may have another dtype. Its gradient is converted to that dtype from float32, without rounding to bfloat16 first.
    """
    return _einsum("ti,io->to", x, kernel.astype(x.dtype)).astype(x.dtype)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], y_grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    x_grad = _einsum("to,io->ti", y_grad, kernel.astype(x.dtype)).astype(x.dtype)
    return x_grad, _einsum("it,to->io", _transpose_in_memory(x), y_grad).astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum in float32. An explicit transposition of `b` would make XLA convert both operands."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _transpose_in_memory(x: BFloat16[Array, "t i"]) -> BFloat16[Array, "i t"]:
    """Return x transposed, in two halves.

    XLA would fold a single transposition into the matmul. The sum would then run over the first axis, for which XLA converts
    both operands to float32.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)  # XLA would convert bfloat16 numbers to float32 to copy them
    halves = jnp.split(bits, [x.shape[1] // 2], axis=1)
    return jax.lax.bitcast_convert_type(jnp.concatenate([half.T for half in halves]), x.dtype)
