"""A step of graded objectives and embedding matching: equal on any mesh, with gradient caching and adapters; bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.loading import load_model
from helpers.text_batches import draw_unit_vectors
from helpers.training_batches import BATCH_SIZE, SPEC, assert_sums_are_float32, assert_trees_close, build_host_batches
from jaxembed.config import (
    AnglEConfig,
    CoSENTConfig,
    CosineRegressionConfig,
    EmbeddingMatchingConfig,
    ExitsConfig,
    InfoNCEConfig,
    LoraConfig,
    MatryoshkaConfig,
    QuantizationConfig,
)
from jaxembed.data.batch import Batch, FrozenVectors
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.losses.objectives import Objectives
from jaxembed.model.lora import join_params, split_params
from jaxembed.training.step import compute_batch_loss

VERSIONS = ("", "_8", "_int8", "_binary")  # of the vectors, in the names of losses
OBJECTIVES = Objectives(
    [
        CoSENTConfig(temperature=0.2), InfoNCEConfig(temperature=0.2), AnglEConfig(), CosineRegressionConfig(),
        EmbeddingMatchingConfig(teacher="a model"),
    ],
    MatryoshkaConfig(dims=(8,)),
    quantization=QuantizationConfig(precisions=("int8", "binary"), weights=(0.5, 2.0)),
    ranges=((-0.3,) * 32, (0.3,) * 32),  # some values are clipped
)  # fmt: skip


def add_targets(batch: Batch) -> Batch:
    """Return the batch with random scores, and with random vectors of a teacher."""
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, BATCH_SIZE) / np.float32(5)
    teacher = FrozenVectors(*(draw_unit_vectors(random, *x.shape, 32) for x in (batch.query_slot, batch.doc_slot)))
    return batch.replace(score=scores, is_positive=scores >= 0.8, teacher=teacher)


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
                batch = put_batch(mesh, add_targets(build_host_batches(source, devices, 1, row_length=32)[0].batch))

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


def test_sums_are_float32_under_bfloat16(base_folder: Callable[[str], Path], source: Source) -> None:
    """With early exits and quantized vectors too."""
    model, params = load_model(base_folder("qwen2"), SPEC, 1, dtype=jnp.bfloat16)
    batch = add_targets(build_host_batches(source, 1, 1)[0].batch)
    objectives = dataclasses.replace(OBJECTIVES, exits=ExitsConfig(random=1, align=0.5))
    loss = jax.jit(lambda params, batch: compute_batch_loss(model, objectives, params, batch, jax.random.key(0)))
    assert_sums_are_float32(loss.trace(params, batch))
    vectors = jnp.ones((BATCH_SIZE, 4, 2, 32))  # of a query and three documents, from the whole model and an exit
    program = jax.make_jaxpr(lambda v, b: objectives.sum_over_exits(v, b, jax.random.key(0), {}, 1)[0])(vectors, batch)
    assert "bf16" not in str(program)
