"""The training state and the train step: encode, compute the loss, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxembed.config import CausalLMConfig, DropoutConfig
from jaxembed.data.batch import Batch
from jaxembed.devices.cpu import get_compiler_options
from jaxembed.losses.exits import draw_exit_layers
from jaxembed.losses.objectives import Objectives
from jaxembed.losses.token_prediction import average_over_groups, kl_divergence, token_prediction_loss
from jaxembed.model.embedder import EmbeddingModel, get_head_table
from jaxembed.model.lora import join_params, pick_adapter, put_adapter, zero_adapters
from jaxembed.model.masks import MASKS
from jaxembed.training.embedding_rows import list_embedding_rows, pick_rows, put_rows, select_rows
from jaxembed.training.gradcache import encode, encode_tokens
from jaxembed.training.optim import count_updates

Metrics = dict[str, jax.Array]
SCOPES = ("loss", "encode", "optimizer")  # names of the parts of a step in the compiled program
OBJECTIVE_PARAMS = "objectives"  # name of the objectives' parameters among the trained ones; the model does not have them


@flax.struct.dataclass
class TrainState:
    """The state of training, a pytree.

    Several adapters are stacked, in `params` and in `opt_state`.

    Attributes:
        params: The trained parameters, float32. Those of the objectives are under OBJECTIVE_PARAMS.
        opt_state: State of the optax optimizer.
        step: Number of completed steps, int32.
        key: Random key of the run.
        frozen: Parameters that are not trained: those of a base under adapters, which are not part of checkpoints, or those
            of `model.frozen`, which are.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    frozen: Any = flax.struct.field(default_factory=dict)

    @property
    def weights(self) -> Any:
        """All parameters of the model."""
        return join_params({name: part for name, part in self.params.items() if name != OBJECTIVE_PARAMS}, self.frozen)


def compute_batch_loss(
    model: EmbeddingModel,
    objectives: Objectives,
    params: Any,
    batch: Batch,
    key: jax.Array,
    chunk_rows: int | None = None,
    *,
    recompute: bool = True,
) -> tuple[jax.Array, Metrics]:
    """Compute the loss of a global batch. It has seven parameters because a step chooses each of them.

    Args:
        model: The model.
        objectives: The objectives to minimize.
        params: Parameters of the model, and of the objectives under OBJECTIVE_PARAMS.
        batch: The batch.
        key: Random key of dropout and of the objectives.
        chunk_rows: Rows that each device encodes at a time (gradient caching); None for all.
        recompute: Whether chunks are encoded again in the backward pass.

    Returns:
        The weighted sum of the objectives, and its parts by name.
    """
    dropout_key, objectives_key, exits_key = jax.random.split(key, 3)
    total, metrics = jnp.zeros(()), dict[str, jax.Array]()
    # Add the objectives that compare vectors.
    if batch.texts is not None:
        with jax.named_scope("encode"):
            slots = jnp.concatenate([batch.query_slot[:, None], batch.doc_slot], axis=1)
            exit_layers = draw_exit_layers(objectives.exits, model.transformer.layers, exits_key)
            vectors = encode(model, params, batch.texts, slots, dropout_key, chunk_rows, exit_layers, recompute=recompute)
        with jax.named_scope("loss"):
            objective_params, shards = params.get(OBJECTIVE_PARAMS, {}), batch.texts.shards
            if exit_layers is None:
                vectors = vectors[:, :, None]
            total, metrics = objectives.sum_over_exits(vectors, batch, objectives_key, objective_params, shards)
    # Add the objectives that predict tokens.
    for i, (label, config) in enumerate(objectives.token_configs.items()):
        tokens, token_key = batch.token_batches[label], jax.random.fold_in(dropout_key, i)
        with jax.named_scope("encode"):
            mask = MASKS[config.select_attention(model.spec.attention)]
            hidden = encode_tokens(model, mask, params, tokens, token_key, chunk_rows, recompute=recompute)
        with jax.named_scope("loss"):
            metrics[label] = token_prediction_loss(config, hidden, get_head_table(model, params), tokens)
            total = total + config.weight * metrics[label]
        if isinstance(config, CausalLMConfig) and config.kl_to_base:
            with jax.named_scope("encode"):
                base = model.clone(compute=dataclasses.replace(model.compute, dropout=DropoutConfig()))
                reference = encode_tokens(base, mask, zero_adapters(params), tokens, token_key, chunk_rows, recompute=recompute)
            with jax.named_scope("loss"):
                losses = kl_divergence(reference, hidden, get_head_table(model, params))
                metrics[f"{label}_kl"] = average_over_groups(config, losses, tokens)
                total = total + config.weight * config.kl_to_base * metrics[f"{label}_kl"]
    return total, metrics


def make_train_step(
    model: EmbeddingModel,
    objectives: Objectives,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    skip_nonfinite: bool = False,
    lazy_embedding: bool = False,
    chunk_rows: int | None = None,
    recompute: bool = True,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build the compiled train step. It takes more than six parameters because a stage may choose each of them.

    Adapters that a batch does not train keep their parameters and moments.

    Args:
        model: The model.
        objectives: The objectives to minimize.
        optimizer: Updates the trained parameters.
        schedule: The learning rate of `optimizer`, for the metrics.
        skip_nonfinite: If the loss or the gradient is not finite, leave parameters and optimizer as they are. The step counts,
            but the schedule does not advance.
        lazy_embedding: Update only the rows of the token embedding that the batch reads.
        chunk_rows: Rows that each device encodes at a time (gradient caching); None for all.
        recompute: Whether chunks are encoded again in the backward pass.
        shardings: Shardings of the state, which the step keeps. Default: XLA's choice.

    Returns:
        A function (state, batch) -> (state, metrics). It donates the state, and compiles once for each shape of a batch.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Select what the batch trains: one of several adapters, or some rows of the embedding.
        selected = pick_adapter((state.params, state.opt_state), batch.adapter)
        rows, step_model, step_batch = None, model, batch
        if lazy_embedding:
            rows = list_embedding_rows(model, batch)
            step_model, step_batch = select_rows(model, batch, rows)
        params, opt_state = before = pick_rows(selected, rows)

        # Compute the loss and the gradients of the trained parameters.
        def compute_loss(params: Any) -> tuple[jax.Array, Metrics]:
            key = jax.random.fold_in(state.key, state.step)
            all_params = join_params(params, state.frozen)
            return compute_batch_loss(step_model, objectives, all_params, step_batch, key, chunk_rows, recompute=recompute)

        (loss, parts), grads = jax.value_and_grad(compute_loss, has_aux=True)(params)
        with jax.named_scope("optimizer"):
            grad_norm = optax.global_norm(grads)

        # Update, unless the step is skipped.
        def update() -> tuple[Any, Any]:
            updates, new_opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), new_opt_state

        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            after = jax.lax.cond(is_finite, update, lambda: before) if skip_nonfinite else update()

        # Put the rows back into the embedding, and the adapter into the stack.
        with jax.named_scope("optimizer"):
            after = put_rows(selected, rows, after)
        new_params, new_opt_state = put_adapter((state.params, state.opt_state), batch.adapter, after)
        rate = schedule(count_updates(state.opt_state))
        metrics = {"loss": loss, **parts, "grad_norm": grad_norm, "learning_rate": jnp.asarray(rate)}
        if batch.adapter is not None:
            metrics["adapter"] = batch.adapter
        return dataclasses.replace(state, params=new_params, opt_state=new_opt_state, step=state.step + 1), metrics

    options = get_compiler_options()
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
