"""A step of graded objectives: any mesh, gradient caching, adapters and bfloat16 give the same loss and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.loading import load_model
from helpers.training_batches import BATCH_SIZE, SPEC, assert_trees_close, build_host_batches
from jaxembed.config import (
    AnglEConfig,
    CoSENTConfig,
    CosineRegressionConfig,
    ExitsConfig,
    InfoNCEConfig,
    LoraConfig,
    MatryoshkaConfig,
    QuantizationConfig,
)
from jaxembed.data.batch import Batch
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.losses.objectives import Objectives
from jaxembed.model.lora import join_params, split_params
from jaxembed.training.step import compute_batch_loss

VERSIONS = ("", "_8", "_int8", "_binary")  # of the vectors, in the names of losses
OBJECTIVES = Objectives(
    [CoSENTConfig(temperature=0.2), InfoNCEConfig(temperature=0.2), AnglEConfig(), CosineRegressionConfig()],
    MatryoshkaConfig(dims=(8,)),
    quantization=QuantizationConfig(precisions=("int8", "binary"), weights=(0.5, 2.0)),
    ranges=((-0.3,) * 32, (0.3,) * 32),  # some values are clipped
)


def add_scores(batch: Batch) -> Batch:
    scores = np.random.default_rng(0).integers(0, 6, BATCH_SIZE) / np.float32(5)
    return batch.replace(score=scores, is_positive=scores >= 0.8)


def test_loss_and_gradients_of_adapters_on_eight_devices_in_chunks(base_folder: Callable[[str], Path], source: Source) -> None:
    """At two widths and in two precisions too. In float64, so that rounding to integers gives the same on every mesh."""
    results = []
    with jax.enable_x64(True):
        for devices, chunk_rows in ((1, None), (8, 1)):
            keys = {"lora": LoraConfig(rank=4, alpha=8.0), "unroll": False, "dtype": jnp.float64}
            model, params = load_model(base_folder("qwen2"), SPEC, devices, **keys)
            trained, frozen = split_params(jax.tree.map(lambda x: jax.device_put(np.float64(x), x.sharding), params))
            trained = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trained)
            mesh = make_mesh(devices)
            with jax.set_mesh(mesh):
                batch = put_batch(mesh, add_scores(build_host_batches(source, devices, 1, row_length=32)[0].batch))

                def loss(trained, frozen, batch, model=model, chunk_rows=chunk_rows):
                    params = join_params(trained, frozen)
                    return compute_batch_loss(model, OBJECTIVES, params, batch, jax.random.key(3), chunk_rows)

                compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
                results.append(jax.device_get(compute(trained, frozen, batch)))
    ((_, parts), grads), ((_, sharded_parts), sharded_grads) = results
    assert len({float(parts[f"{name}{version}"]) for name in ("cosent", "infonce") for version in VERSIONS}) == 8
    for name, part in parts.items():
        assert float(sharded_parts[name]) == pytest.approx(float(part), rel=1e-9), name
    assert_trees_close(grads, sharded_grads)


def test_reductions_are_float32_under_bfloat16(base_folder: Callable[[str], Path], source: Source) -> None:
    """With early exits and quantized vectors too."""
    model, params = load_model(base_folder("qwen2"), SPEC, 1, dtype=jnp.bfloat16)
    batch = add_scores(build_host_batches(source, 1, 1)[0].batch)
    changes = {"matryoshka": MatryoshkaConfig(), "quantization": QuantizationConfig(precisions=("int8",))}
    objectives = dataclasses.replace(OBJECTIVES, exits=ExitsConfig(random=1, align=0.5), **changes)
    loss, parts = jax.eval_shape(lambda p, b: compute_batch_loss(model, objectives, p, b, jax.random.key(0)), params, batch)
    assert {"exit_random", "exit_align", "cosent_int8"} <= parts.keys()
    assert {x.dtype for x in (loss, *parts.values())} == {np.dtype(np.float32)}
