"""Matmuls by numpy's BLAS inside compiled programs: where they are used, and that they are right."""

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

from helpers.commands import ENV
from helpers.loading import draw_texts, load_model, pack_texts
from helpers.training_batches import SPEC
from jaxembed.devices import blas
from jaxembed.devices.mesh import make_mesh
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.matmul import sharded_matmul
from jaxembed.model.transformer import ComputeOptions
from jaxembed.planning.flops import count_matmul_flops


def draw_normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def test_values_and_gradients_equal_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "MIN_FLOPS", 0)
    x, kernel, weights = draw_normal(37, 24), draw_normal(24, 50), draw_normal(37, 50)
    run = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(sharded_matmul(x, kernel, 0) * weights), (0, 1)))
    assert run.lower(x, kernel).as_text().count("@jaxembed_matmul") == 3
    value, gradients = run(x, kernel)
    x64, kernel64, weights64 = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    np.testing.assert_allclose(value, np.sum(x64 @ kernel64 * weights64), rtol=1e-5)
    for gradient, expected in zip(gradients, (weights64 @ kernel64.T, x64.T @ weights64), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
    for arguments, matmuls in (((0, 1), 3), (0, 2)):  # one of them forward
        traced = jax.make_jaxpr(jax.grad(lambda *a: jnp.square(sharded_matmul(*a, 0)).sum(), arguments))(x, kernel)
        assert count_matmul_flops(traced) == matmuls * 2 * 37 * 24 * 50


def test_blas_is_used_for_large_float32_matrices_on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = draw_normal(8, 16), draw_normal(16, 4)
    assert not blas.is_worthwhile(x, kernel), "too small"
    monkeypatch.setattr(blas, "MIN_FLOPS", 2 * 8 * 16 * 4)
    assert blas.is_worthwhile(x, kernel)
    assert not blas.is_worthwhile(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    with jax.set_mesh(make_mesh(1)):
        assert blas.is_worthwhile(x, kernel)
    with jax.set_mesh(make_mesh(2)):
        assert not blas.is_worthwhile(x, kernel), "XLA does not split such a call over devices"


def test_a_model_has_the_same_gradients(base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers run in a loop and are recomputed in the backward pass."""
    packed, _ = pack_texts(draw_texts((3, 17, 30, 9)), 32)
    config = parse_hf_config(json.loads((base_folder("qwen2") / "config.json").read_text()), "qwen2")
    model, (_, params) = (
        EmbeddingModel(config, SPEC, ComputeOptions(remat=True, unroll=False)),
        load_model(base_folder("qwen2"), SPEC, 1),
    )
    weights = draw_normal(len(packed.tokens), packed.segments, 32)
    gradients = []
    for min_flops in (1 << 40, 0):
        monkeypatch.setattr(blas, "MIN_FLOPS", min_flops)
        run = jax.jit(jax.grad(lambda params: jnp.sum(model.apply({"params": params}, packed) * weights)))
        assert ("@jaxembed_matmul" in run.lower(params).as_text()) == (min_flops == 0)
        gradients.append(jax.tree.leaves(run(params)))
    for a, b in zip(*gradients, strict=True):
        assert np.linalg.norm(a) > 0 and np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


UNFINISHED_PROGRAM = """
import jax, jax.numpy as jnp
from jaxembed.devices import blas
x = jnp.ones((512, 512))
jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda i, y: jnp.tanh(blas.matmul(y, x)), x))(x)
print("main thread is done")
"""


def test_the_interpreter_exits_while_a_program_runs() -> None:
    command = [sys.executable, "-c", UNFINISHED_PROGRAM]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "main thread is done\n"), done.stderr[-2000:]
