"""The training step: the same on eight devices as on one, traced once a shape, and it learns."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from helpers.loading import load
from helpers.training_batches import BATCH_SIZE, SPEC, build_host_batches
from jaxembed.config import InfoNCEConfig, OptimConfig
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import make_mesh, shard_count
from jaxembed.devices.placement import put_batch, replicated_sharding
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.training.optim import learning_rate, make_optimizer
from jaxembed.training.step import TrainState, batch_loss, make_train_step

Folder = Callable[[str], Path]
def new_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    params = jax.tree.map(jnp.copy, params)  # a step consumes its state
    everywhere = replicated_sharding(mesh)
    opt_state = optax.tree.map_params(
        optimizer, lambda x, like: jax.device_put(x, like.sharding), jax.jit(optimizer.init)(params), params,
        transform_non_params=lambda x: jax.device_put(x, everywhere),
    )  # fmt: skip
    return TrainState(params, opt_state, *jax.device_put((jnp.zeros((), jnp.int32), jax.random.key(0)), everywhere))


def run(
    model: EmbeddingModel,
    params: Any,
    source: Source,
    mesh: Mesh,
    steps: int,
    temperature: float = 0.1,
    row_length: int = 128,
) -> tuple[TrainState, np.ndarray, list[dict[str, float]]]:
    """The state, the losses and the metrics after some steps on a mesh, over the same few batches: each shape is a program."""
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=5)
    optimizer = make_optimizer(optim, steps)
    state, metrics = new_state(params, optimizer, mesh), []
    objectives, placed = Objectives([InfoNCEConfig(temperature=temperature)]), jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model, objectives, optimizer, learning_rate(optim, steps), shardings=placed)
    few = build_host_batches(source, shard_count(mesh), 2, row_length)
    for host in islice(cycle(few), steps):
        with jax.set_mesh(mesh):
            state, values = step(state, put_batch(mesh, host.batch))
        metrics.append({name: float(value) for name, value in values.items()})
    return state, np.array([values["loss"] for values in metrics]), metrics


def test_in_float64_meshes_of_eight_devices_stay_with_one_for_fifty_steps(base_folder: Folder, source: Source) -> None:
    with jax.enable_x64(True):
        curves = []
        for shape in ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1)):
            mesh = make_mesh(*shape)
            model, params = load(base_folder("qwen2"), SPEC, mesh, dtype=jnp.float64, unroll=False)
            params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
            state, losses, _ = run(model, params, source, mesh, 50, row_length=32)
            assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float64"}
            curves.append(losses)
    assert np.abs(np.array(curves[1:]) - curves[0]).max() < 1e-7
    assert curves[0][-1] < curves[0][0] - 0.5


def test_training_reduces_the_loss_and_reports_itself(base_folder: Folder, source: Source) -> None:
    model, params = load(base_folder("qwen2"), SPEC)
    state, losses, metrics = run(model, params, source, make_mesh(1), 24)
    assert losses[-4:].mean() < 0.7 * losses[:4].mean()
    assert metrics[-1]["infonce_accuracy"] > metrics[0]["infonce_accuracy"]
    assert metrics[0]["infonce_negatives"] == BATCH_SIZE * 3 - 1
    assert {"loss", "infonce", "grad_norm"} < set(metrics[0])
    assert int(state.step) == 24
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_the_step_is_traced_and_compiled_once_for_each_number_of_rows(
    base_folder: Folder, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    model, params = load(base_folder("qwen2"), SPEC, devices=8)
    mesh = make_mesh(8)
    inner, traced = make_optimizer(OptimConfig(), 10), []

    def update(grads: Any, state: Any, params: Any) -> Any:
        traced.append(None)
        return inner.update(grads, state, params)

    optimizer = optax.GradientTransformation(inner.init, update)
    state = new_state(params, optimizer, mesh)
    objectives, placed = Objectives([InfoNCEConfig()]), jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model, objectives, optimizer, learning_rate(OptimConfig(), 10), shardings=placed)
    shapes = set()
    for host in [*build_host_batches(source, 8, 3, row_length=128), *build_host_batches(source, 8, 2, row_length=64)]:
        shapes.add(host.batch.texts.tokens.shape)
        with jax.log_compiles():
            state, _ = step(state, put_batch(mesh, host.batch))
    compiled = [line for line in caplog.messages if "Finished XLA compilation of jit(train_step)" in line]
    assert 1 < len(shapes) < 5
    assert len(traced) == len(shapes) == len(compiled)


def test_objectives_add_up_by_their_weights(base_folder: Folder, source: Source) -> None:
    model, params = load(base_folder("qwen2"), SPEC)
    batch = put_batch(make_mesh(1), build_host_batches(source, 1, 1)[0].batch)

    def loss(*objectives: InfoNCEConfig) -> float:
        return float(jax.jit(lambda p, b: batch_loss(model, Objectives(objectives), p, b, jax.random.key(0))[0])(params, batch))

    warm, cold = InfoNCEConfig(temperature=0.5), InfoNCEConfig(temperature=0.1, weight=3.0)
    assert loss(warm, cold) == pytest.approx(loss(warm) + loss(cold), rel=1e-5)
    assert loss(cold) == pytest.approx(3 * loss(InfoNCEConfig(temperature=0.1)), rel=1e-5)


def test_all_sums_are_float32_where_the_model_computes_in_bfloat16(base_folder: Folder, source: Source) -> None:
    """Norms, softmax, pooling, similarities, the gradients of biases and scales; parameters and moments are held so."""
    model, params = load(base_folder("qwen2"), SPEC, dtype=jnp.bfloat16)
    optimizer = make_optimizer(OptimConfig(), 10)
    state, batch = new_state(params, optimizer, make_mesh(1)), build_host_batches(source, 1, 1)[0].batch
    step = make_train_step(model, Objectives([InfoNCEConfig()]), optimizer, learning_rate(OptimConfig(), 10))
    traced = step.trace(state, batch)
    made = {(name, dtype) for dtype, name in re.findall(r":(\w+)\[[^\]]*\] = (\w+)", str(traced.jaxpr))}
    assert ("dot_general", "bf16") in made  # the layers' products
    assert {("reduce_sum", "f32"), ("rsqrt", "f32"), ("exp", "f32"), ("reduce_max", "f32"), ("log", "f32")} <= made
    sums = {name for name, dtype in made if dtype == "bf16" and (name.startswith(("reduce", "cum", "scatter")))}
    assert not sums | {name for name in ("exp", "log", "rsqrt", "div", "sqrt") if (name, "bf16") in made}
    assert not [leaf for leaf in jax.tree.leaves(traced.out_info) if leaf.dtype == jnp.bfloat16]


def test_losses_are_float32_where_the_model_computes_in_bfloat16(base_folder: Folder, source: Source) -> None:
    batch = put_batch(make_mesh(1), build_host_batches(source, 1, 1)[0].batch)
    objectives, found = Objectives([InfoNCEConfig(temperature=0.2)]), {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model, params = load(base_folder("qwen2"), SPEC, dtype=dtype)
        value = jax.value_and_grad(lambda p, b: batch_loss(model, objectives, p, b, jax.random.key(0)), has_aux=True)  # noqa: B023
        (loss, parts), grads = jax.jit(value)(params, batch)
        assert {x.dtype.name for x in jax.tree.leaves((loss, parts, grads))} == {"float32"}
        found[dtype] = float(loss)
        program = str(jax.make_jaxpr(lambda v, b: objectives(v, v[:, None], b, jax.random.key(0), {}, 1))(
            jnp.ones((BATCH_SIZE, 32)), batch.replace(doc_slot=batch.doc_slot[:, :1], doc_hash=batch.doc_hash[:, :1])
        ))  # fmt: skip
        assert "bf16" not in program
    assert 0 < abs(found[jnp.float32] - found[jnp.bfloat16]) < 0.05 * found[jnp.float32]
