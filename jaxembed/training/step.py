"""The training state and the step: encode, lose, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxembed.data.batch import Batch
from jaxembed.devices.cpu import compiler_options
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.lora import join, pick_adapter, put_adapter
from jaxembed.training.gradcache import encode
from jaxembed.training.optim import updates_done

Metrics = dict[str, jax.Array]
SCOPES = ("loss", "encode", "optimizer")  # of a step, named in the compiled program
OBJECTIVES = "objectives"  # of the trained parameters: those of the objectives, which are no part of the model


@flax.struct.dataclass
class TrainState:
    """params: the trained parameters, float32; opt_state: optax's; step: int32 steps done; key: random key of the run.

    The objectives' own parameters stand under OBJECTIVES. frozen: the parameters that are not trained (of a base under
    adapters), which no checkpoint holds. Several adapters are stacked, in params and opt_state.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    frozen: Any = flax.struct.field(default_factory=dict)

    @property
    def weights(self) -> Any:
        """All parameters of the model."""
        return join({name: part for name, part in self.params.items() if name != OBJECTIVES}, self.frozen)


def batch_loss(
    model: EmbeddingModel, objectives: Objectives, params: Any, batch: Batch, key: jax.Array, rows: int | None = None
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the objectives on a global batch, and their parts by name.

    `params` are the model's and, under OBJECTIVES, the objectives'. `key` is that of all draws. With `rows` so many rows are
    encoded at a time (gradient caching).
    """
    of_dropout, of_objectives = jax.random.split(key)
    with jax.named_scope("encode"):
        slots = jnp.concatenate([batch.query_slot[:, None], batch.doc_slot], axis=1)
        vectors = encode(model, params, batch.texts, slots, of_dropout, rows)
    with jax.named_scope("loss"):
        own = params.get(OBJECTIVES, {})
        return objectives(vectors[:, 0], vectors[:, 1:], batch, of_objectives, own, batch.texts.shards)


def make_train_step(
    model: EmbeddingModel,
    objectives: Objectives,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    skip: bool = False,
    rows: int | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step (state, batch) -> (state, metrics); it consumes the state. It compiles once per batch shape.

    `schedule` is the optimizer's learning rate, for the metrics. With `skip`, a loss or gradient that is not finite leaves
    parameters and optimizer as they were; the step counts, the schedule stands still. Of several adapters, those that the
    batch does not train keep their parameters and moments. `rows`: see `batch_loss`. `shardings` are those of the state, which
    it keeps; XLA's choice if absent.
    """

    if model.lora is not None:
        model = model.clone(lora=model.lora.training())

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        before = pick_adapter((state.params, state.opt_state), batch.adapter)

        def loss_of(params: Any) -> tuple[jax.Array, Metrics]:
            key = jax.random.fold_in(state.key, state.step)
            return batch_loss(model, objectives, join(params, state.frozen), batch, key, rows)

        (loss, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(before[0])
        with jax.named_scope("optimizer"):
            norm = optax.global_norm(grads)

        def update() -> tuple[Any, Any]:
            params, opt_state = before
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.named_scope("optimizer"):
            after = jax.lax.cond(good, update, lambda: before) if skip else update()
        params, opt_state = put_adapter((state.params, state.opt_state), batch.adapter, after)
        rate = schedule(updates_done(state.opt_state))
        metrics = {"loss": loss, **parts, "grad_norm": norm, "learning_rate": jnp.asarray(rate)}
        if batch.adapter is not None:
            metrics["adapter"] = batch.adapter
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), metrics

    options = compiler_options()
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
