"""Matmuls in bfloat16 on CPUs: they have the form for which XLA has kernels, and sum in float32."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.devices import bfloat16, blas
from jaxembed.devices.mesh import make_mesh
from jaxembed.model.matmul import sharded_matmul


def draw_normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def test_values_and_gradients_equal_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "MIN_FLOPS", 0)
    x, kernel, y_grad = draw_normal(37, 24).astype(jnp.bfloat16), draw_normal(24, 50), draw_normal(37, 50).astype(jnp.bfloat16)

    def multiply(x: jax.Array, kernel: jax.Array, y_grad: jax.Array) -> tuple[jax.Array, ...]:
        y, backward = jax.vjp(lambda x, kernel: sharded_matmul(x, kernel, 0), x, kernel)
        return y, *backward(y_grad)

    compiled = jax.jit(multiply).lower(x, kernel, y_grad).compile()
    # XLA's kernels need the last axis of the first operand, and operands that are not converted to float32.
    dots = [line for line in compiled.as_text().splitlines() if " dot(" in line]
    assert len(dots) == 3 and all("lhs_contracting_dims={1}" in line for line in dots)
    assert not re.search(r"= f32\[\d+,\d+\]\S* convert", compiled.as_text())

    y, x_grad, kernel_grad = compiled(x, kernel, y_grad)
    assert (y.dtype, x_grad.dtype, kernel_grad.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x64, kernel64, grad64 = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, kernel, y_grad))
    rounding = 2.0**-8
    np.testing.assert_allclose(np.asarray(y, np.float64), x64 @ kernel64, rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(np.asarray(x_grad, np.float64), grad64 @ kernel64.T, rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(kernel_grad, x64.T @ grad64, rtol=1e-5, atol=1e-5)


def test_the_form_is_used_for_large_bfloat16_matrices_on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = draw_normal(8, 16).astype(jnp.bfloat16), draw_normal(16, 4)
    assert not bfloat16.is_worthwhile(x, kernel), "too small"
    monkeypatch.setattr(blas, "MIN_FLOPS", 2 * 8 * 16 * 4)
    assert bfloat16.is_worthwhile(x, kernel)
    assert not bfloat16.is_worthwhile(x.astype(jnp.float32), kernel)
    with jax.set_mesh(make_mesh(2)):
        assert not bfloat16.is_worthwhile(x, kernel)


@pytest.mark.parametrize(
    ("flags", "tuning", "expected"),
    [
        ("fpu avx512f avx512_bf16", "on", True), ("fpu amx_bf16", "on", True), ("fpu avx512f", "on", False),
        ("fpu amx_bf16", "off", False), (None, "on", False),
    ],
)  # fmt: skip
def test_instructions_of_the_cpu_are_recognized(
    flags: str | None, tuning: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("JAXEMBED_CPU_TUNING", tuning)
    if flags:
        bfloat16.CPU_INFO.write_text(f"processor\t: 0\nflags\t\t: {flags}\nprocessor\t: 1\n")
    bfloat16._list_cpu_flags.cache_clear()
    try:
        assert bfloat16.has_fast_matmuls() == expected
    finally:
        bfloat16._list_cpu_flags.cache_clear()
