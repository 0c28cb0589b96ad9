"""The train step: it learns, is the same on eight devices as on one, and is traced once for each shape."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, Sharding

from helpers.loading import load_model
from helpers.training_batches import BATCH_SIZE, SPEC, assert_sums_are_float32, build_host_batches
from jaxembed.config import InfoNCEConfig, OptimConfig
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import count_shards, make_mesh
from jaxembed.devices.placement import make_replicated_sharding, put_batch
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.training.optim import make_optimizer, make_schedule
from jaxembed.training.step import TrainState, compute_batch_loss, make_train_step

Folder = Callable[[str], Path]


def place_copy(x: jax.Array, sharding: Sharding, dtype: Any = None) -> jax.Array:
    """Copy an array to devices by way of numpy, which compiles nothing."""
    return jax.device_put(np.array(x, dtype), sharding)


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    params = jax.tree.map(lambda x: place_copy(x, x.sharding), params)  # a step donates its state
    replicated = make_replicated_sharding(mesh)
    opt_state = optax.tree.map_params(
        optimizer, lambda x, like: place_copy(x, like.sharding), jax.jit(optimizer.init)(params), params,
        transform_non_params=lambda x: place_copy(x, replicated),
    )  # fmt: skip
    return TrainState(params, opt_state, *jax.device_put((jnp.zeros((), jnp.int32), jax.random.key(0)), replicated))


def train_steps(
    model: EmbeddingModel, params: Any, source: Source, mesh: Mesh, steps: int, row_length: int = 128
) -> tuple[TrainState, np.ndarray, list[dict[str, float]]]:
    """Train on two batches in turn. Return the state, the losses [steps], and the metrics of each step."""
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=5)
    optimizer = make_optimizer(optim, steps)
    state, metrics = init_state(params, optimizer, mesh), []
    objectives, shardings = Objectives([InfoNCEConfig(temperature=0.1)]), jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model, objectives, optimizer, make_schedule(optim, steps), shardings=shardings)
    batches = [put_batch(mesh, host.batch) for host in build_host_batches(source, count_shards(mesh), 2, row_length)]
    with jax.set_mesh(mesh):
        for batch in islice(cycle(batches), steps):
            state, values = step(state, batch)
            metrics.append(jax.device_get(values))
    return state, np.array([values["loss"] for values in metrics]), metrics


def test_eight_devices_train_like_one_for_fifty_steps(base_folder: Folder, source: Source) -> None:
    """Compute in float64, so that the runs do not diverge by rounding errors."""
    with jax.enable_x64(True):
        curves = []
        for shape in ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1)):
            mesh = make_mesh(*shape)
            model, params = load_model(base_folder("qwen2"), SPEC, mesh, dtype=jnp.float64, unroll=False)
            params = jax.tree.map(lambda x: place_copy(x, x.sharding, np.float64), params)
            state, losses, _ = train_steps(model, params, source, mesh, 50, row_length=32)
            assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float64"}
            curves.append(losses)
    assert np.abs(np.array(curves[1:]) - curves[0]).max() < 1e-7
    assert curves[0][-1] < curves[0][0] - 0.5


def test_training_reduces_the_loss_and_reports_metrics(base_folder: Folder, source: Source) -> None:
    model, params = load_model(base_folder("qwen2"), SPEC)
    state, losses, metrics = train_steps(model, params, source, make_mesh(1), 24)
    assert losses[-4:].mean() < 0.7 * losses[:4].mean()
    assert metrics[-1]["infonce_accuracy"] > metrics[0]["infonce_accuracy"]
    assert metrics[0]["infonce_negatives"] == BATCH_SIZE * 3 - 1
    assert {"loss", "infonce", "grad_norm"} < set(metrics[0])
    assert int(state.step) == 24
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_the_step_is_traced_and_compiled_once_for_each_shape(
    base_folder: Folder, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    model, params = load_model(base_folder("qwen2"), SPEC, devices=8)
    mesh = make_mesh(8)
    inner, traces = make_optimizer(OptimConfig(), 10), []

    def update(grads: Any, state: Any, params: Any) -> Any:
        traces.append(None)
        return inner.update(grads, state, params)

    optimizer = optax.GradientTransformation(inner.init, update)
    state = init_state(params, optimizer, mesh)
    objectives, shardings = Objectives([InfoNCEConfig()]), jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model, objectives, optimizer, make_schedule(OptimConfig(), 10), shardings=shardings)
    shapes = set()
    for host in [*build_host_batches(source, 8, 3, row_length=128), *build_host_batches(source, 8, 2, row_length=64)]:
        shapes.add(host.batch.texts.tokens.shape)
        with jax.log_compiles():
            state, _ = step(state, put_batch(mesh, host.batch))
    compilations = [line for line in caplog.messages if "Finished XLA compilation of jit(train_step)" in line]
    assert 1 < len(shapes) < 5
    assert len(traces) == len(shapes) == len(compilations)


def test_the_loss_is_the_weighted_sum_of_the_objectives(base_folder: Folder, source: Source) -> None:
    model, params = load_model(base_folder("qwen2"), SPEC)
    batch = put_batch(make_mesh(1), build_host_batches(source, 1, 1)[0].batch)

    def loss(*objectives: InfoNCEConfig) -> float:
        return float(
            jax.jit(lambda p, b: compute_batch_loss(model, Objectives(objectives), p, b, jax.random.key(0))[0])(params, batch)
        )

    warm, cold = InfoNCEConfig(temperature=0.5), InfoNCEConfig(temperature=0.1, weight=3.0)
    assert loss(warm, cold) == pytest.approx(loss(warm) + loss(cold), rel=1e-5)
    assert loss(cold) == pytest.approx(3 * loss(InfoNCEConfig(temperature=0.1)), rel=1e-5)


def test_all_sums_are_float32_when_the_model_computes_in_bfloat16(base_folder: Folder, source: Source) -> None:
    """Norms, softmax, pooling, similarities, and gradients of biases and scales. So are parameters and moments."""
    model, params = load_model(base_folder("qwen2"), SPEC, dtype=jnp.bfloat16)
    optimizer = make_optimizer(OptimConfig(), 10)
    state, batch = init_state(params, optimizer, make_mesh(1)), build_host_batches(source, 1, 1)[0].batch
    step = make_train_step(model, Objectives([InfoNCEConfig()]), optimizer, make_schedule(OptimConfig(), 10))
    assert_sums_are_float32(step.trace(state, batch))


def test_losses_are_float32_when_the_model_computes_in_bfloat16(base_folder: Folder, source: Source) -> None:
    batch = put_batch(make_mesh(1), build_host_batches(source, 1, 1)[0].batch)
    objectives, losses = Objectives([InfoNCEConfig(temperature=0.2)]), {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model, params = load_model(base_folder("qwen2"), SPEC, dtype=dtype)
        value = jax.value_and_grad(lambda p, b: compute_batch_loss(model, objectives, p, b, jax.random.key(0)), has_aux=True)  # noqa: B023
        (loss, parts), grads = jax.jit(value)(params, batch)
        assert {x.dtype.name for x in jax.tree.leaves((loss, parts, grads))} == {"float32"}
        losses[dtype] = float(loss)
        program = str(jax.make_jaxpr(lambda v, b: objectives(v, v[:, None], b, jax.random.key(0), {}, 1))(
            jnp.ones((BATCH_SIZE, 32)), batch.replace(doc_slot=batch.doc_slot[:, :1], doc_hash=batch.doc_hash[:, :1])
        ))  # fmt: skip
        assert "bf16" not in program
    assert 0 < abs(losses[jnp.float32] - losses[jnp.bfloat16]) < 0.05 * losses[jnp.float32]
