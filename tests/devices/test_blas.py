"""Products by numpy's BLAS inside compiled programs: where they are taken, and that they are right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import SPEC

from helpers.loading import draw_texts, in_rows, load
from helpers.runs import ENV
from jaxembed.devices import blas
from jaxembed.devices.mesh import make_mesh
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.families import from_hf
from jaxembed.model.matmul import product
from jaxembed.planning.flops import product_flops


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def test_value_and_gradients_are_those_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "LEAST", 0)
    x, kernel, weights = drawn(37, 24), drawn(24, 50), drawn(37, 50)
    run = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(product(x, kernel, 0) * weights), (0, 1)))
    assert run.lower(x, kernel).as_text().count("@jaxembed_product") == 3
    value, gradients = run(x, kernel)
    wide = [np.asarray(a, np.float64) for a in (x, kernel, weights)]
    np.testing.assert_allclose(value, np.sum(wide[0] @ wide[1] * wide[2]), rtol=1e-5)
    for got, wanted in zip(gradients, (wide[2] @ wide[1].T, wide[0].T @ wide[2]), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    for of, products in (((0, 1), 3), (0, 2)):  # forward too
        traced = jax.make_jaxpr(jax.grad(lambda *a: jnp.square(product(*a, 0)).sum(), of))(x, kernel)
        assert product_flops(traced) == products * 2 * 37 * 24 * 50


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = drawn(8, 16), drawn(16, 4)
    assert not blas.multiplies(x, kernel), "too small"
    monkeypatch.setattr(blas, "LEAST", 2 * 8 * 16 * 4)
    assert blas.multiplies(x, kernel)
    assert not blas.multiplies(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    with jax.set_mesh(make_mesh(1)):
        assert blas.multiplies(x, kernel)
    with jax.set_mesh(make_mesh(2)):
        assert not blas.multiplies(x, kernel), "XLA does not split such a call over devices"


def test_a_model_is_the_same(base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In layers that are looped over and computed again in the backward pass."""
    packed, _ = in_rows(draw_texts((3, 17, 30, 9)), 32)
    config = from_hf(json.loads((base_folder("qwen2") / "config.json").read_text()), "qwen2")
    model, (_, params) = EmbeddingModel(config, SPEC, Compute(remat=True, unroll=False)), load(base_folder("qwen2"), SPEC, 1)
    weights = drawn(len(packed.tokens), packed.segments, 32)
    found = []
    for least in (1 << 40, 0):
        monkeypatch.setattr(blas, "LEAST", least)
        run = jax.jit(jax.grad(lambda params: jnp.sum(model.apply({"params": params}, packed) * weights)))
        assert ("@jaxembed_product" in run.lower(params).as_text()) == (least == 0)
        found.append(jax.tree.leaves(run(params)))
    for a, b in zip(*found, strict=True):
        assert np.linalg.norm(a) > 0 and np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


LEFT_ALONE = """
import jax, jax.numpy as jnp
from jaxembed.devices import blas
x = jnp.ones((512, 512))
jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda i, y: jnp.tanh(blas.product(y, x)), x))(x)
print("left")
"""


def test_the_interpreter_ends_while_a_program_runs() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_ALONE], env=ENV, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr[-2000:]
