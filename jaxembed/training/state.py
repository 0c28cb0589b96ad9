"""The training state at the start of a stage, and its shapes, from which a step is compiled without allocating memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxembed.devices.placement import make_replicated_sharding, replicated_jit
from jaxembed.errors import UserError
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.lora import pick_adapter, split_params, stack_adapters, stack_shapes
from jaxembed.model.parameters import attach_shardings, compute_shapes_and_shardings
from jaxembed.training.stage import Stage
from jaxembed.training.step import OBJECTIVE_PARAMS, TrainState


def begin_stage(stage: Stage, state: TrainState, model: EmbeddingModel, mesh: Mesh) -> TrainState:
    """Return the state a stage starts from: the previous stage's, with a fresh optimizer if the stage restarts.

    An objective with parameters keeps those of the objective with the same label in the previous stage.
    """
    # Parameters of objectives: from the previous stage if the label is the same, otherwise fresh.
    key = jax.random.fold_in(state.key, stage.index)
    previous = state.params.get(OBJECTIVE_PARAMS, {})
    fresh = replicated_jit(mesh, partial(stage.init_objective_params, model), key)
    objective_params = {label: previous.get(label, params) for label, params in fresh.items()}
    params = {name: part for name, part in state.params.items() if name != OBJECTIVE_PARAMS}
    if objective_params:
        params |= {OBJECTIVE_PARAMS: objective_params}
    # Optimizer: fresh, or the previous stage's, which fits (`check_optimizers_fit`).
    opt_state = state.opt_state
    if stage.index == 0 or stage.config.optim.restart:
        opt_state = _init_optimizer(stage.make_optimizer(model), params, len(model.adapters), mesh)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def check_optimizers_fit(stages: Sequence[Stage], model: EmbeddingModel) -> None:
    """Raise `UserError` if a stage continues the optimizer, but its objectives train other parameters."""
    previous_labels: Set[str] = set()
    for stage in stages:
        params = jax.eval_shape(partial(stage.init_objective_params, model), jax.random.key(0))
        if stage.index > 0 and not stage.config.optim.restart and params.keys() != previous_labels:
            raise UserError(
                f"stages.{stage.index}: optim.restart is false, but the objectives train other parameters than those of the "
                "previous stage. Set optim.restart=true."
            )
        previous_labels = params.keys()


def compute_state_shapes(
    model: EmbeddingModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    objective_params: Any = None,
    frozen_names: Sequence[str] = (),
) -> TrainState:
    """Return the shapes, with shardings, of the state that a stage starts from. No memory is needed.

    Args:
        model: The model.
        optimizer: The optimizer of the stage.
        mesh: The device mesh.
        objective_params: Shapes of the parameters of the stage's objectives.
        frozen_names: Names of the parameters that are not trained, `model.frozen`.
    """
    replicated, adapter_count = make_replicated_sharding(mesh), len(model.adapters)

    def replicate_shapes(shapes: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes)

    trained, frozen = split_params(attach_shardings(*compute_shapes_and_shardings(model, mesh)), frozen_names)
    if objective_params:
        trained |= {OBJECTIVE_PARAMS: replicate_shapes(objective_params)}
    opt_state = _compute_optimizer_shapes(optimizer, trained, adapter_count, mesh)
    step_and_key = jax.eval_shape(lambda: {"step": jnp.zeros((), jnp.int32), "key": jax.random.key(0)})
    params = stack_shapes(trained, adapter_count) if adapter_count else trained
    return TrainState(params, opt_state, frozen=frozen, **replicate_shapes(step_and_key))


def _init_optimizer(optimizer: optax.GradientTransformation, params: Any, adapter_count: int, mesh: Mesh) -> Any:
    """Return the optimizer's initial state, placed like the parameters.

    With several adapters, `params` are stacked, and so is the state: one entry per adapter.
    """
    if adapter_count:
        params = pick_adapter(params, 0)

    def init(params: Any) -> Any:
        state = optimizer.init(params)
        return stack_adapters([state] * adapter_count) if adapter_count else state

    shapes = _compute_optimizer_shapes(optimizer, params, adapter_count, mesh)
    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(params)


def _compute_optimizer_shapes(optimizer: optax.GradientTransformation, params: Any, adapter_count: int, mesh: Mesh) -> Any:
    """Return the shapes, with shardings, of the optimizer's state. `params` may be shapes too.

    An entry whose path ends in a parameter's path is placed like that parameter; everything else is replicated.
    """
    shardings = {tuple(key.key for key in path): x.sharding for path, x in jax.tree.leaves_with_path(params)}
    replicated = make_replicated_sharding(mesh)

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        keys = tuple(getattr(key, "key", None) for key in path)
        sharding = next((shardings[keys[i:]] for i in range(len(keys)) if keys[i:] in shardings), replicated)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))
    return stack_shapes(shapes, adapter_count) if adapter_count else shapes
