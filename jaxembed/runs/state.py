"""The training state that a run starts from, or resumes from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxembed.devices.placement import replicated_jit
from jaxembed.errors import UserError
from jaxembed.model.embedder import init_params
from jaxembed.model.lora import ADAPTER_PARAMS, join_params, split_params, stack_shapes
from jaxembed.model.parameters import attach_shardings, compute_shapes_and_shardings
from jaxembed.runs.merged_adapters import open_stage_base
from jaxembed.runs.open import OpenedRun
from jaxembed.training.checkpoint import Checkpoints
from jaxembed.training.state import begin_stage
from jaxembed.training.step import TrainState


def make_initial_state(run: OpenedRun, stage_index: int = 0) -> TrainState:
    """Return the state before the first stage: parameters of the base, random where it has none, and no optimizer.

    Each stage has its own base, because adapters of earlier stages may be merged into it.
    """
    shapes, shardings = compute_shapes_and_shardings(run.model, run.mesh)
    key = jax.random.key(run.config.train.seed)
    # Load the parameters of the base.
    params = flatten_dict(open_stage_base(run, stage_index).load(shapes, shardings))
    # Initialize the others at random.
    missing = {path: sharding for path, sharding in flatten_dict(shardings).items() if path not in params}
    params |= flatten_dict(init_params(run.model, key, unflatten_dict(missing)))
    trained, frozen = split_params(unflatten_dict(params), run.config.model.frozen)
    # Several adapters: each starts from its own random key, stacked over the first axis.
    if count := len(run.model.adapters):
        stacked = flatten_dict(stack_shapes(split_params(attach_shardings(shapes, shardings))[0], count))
        adapters = unflatten_dict({path: x.sharding for path, x in stacked.items() if path[-1] in ADAPTER_PARAMS})
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
        trained = join_params(init_params(run.model, keys, adapters), trained)
    step_and_key = replicated_jit(
        run.mesh, lambda: {"step": jnp.zeros((), jnp.int32), "key": jax.random.key(run.config.train.seed)}
    )
    return TrainState(trained, opt_state=None, frozen=frozen, **step_and_key)


def resume(run: OpenedRun, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """Return the index of the stage to continue with, and the state to continue from.

    The state comes from the last checkpoint, or is the initial one if there is no checkpoint.

    Raises:
        UserError: The data of the stage has changed since the checkpoint.
    """
    # Find the stage of the last checkpoint.
    latest = checkpoints.find_latest()
    cursor = {"stage": 0} if latest is None else checkpoints.read_cursor(latest)
    index = cursor["stage"]
    # Build a state of the same structure: every stage up to this one may add parameters and replace the optimizer.
    state = make_initial_state(run, index)
    for stage in run.stages[: index + 1]:
        state = begin_stage(stage, state, run.model, run.mesh)
    if latest is None:
        return 0, state
    # Restore the arrays of the checkpoint, unless this run would draw other batches than those of the checkpoint.
    if cursor["plan_hash"] != run.stages[index].plan_hash:
        raise UserError(
            f"{checkpoints.run_dir}: the training data changed since step {latest}. Restore it, or name another run.dir."
        )
    return index, checkpoints.restore(latest, state)
