"""AdamW with warm-up, decay and clipping, from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxembed.config import OptimConfig
from jaxembed.model.lora import ADAPTER_PARAMS, ADAPTER_STATE

# Last names of parameters. Weight decay applies to matrices, not to norm scales and biases.
DECAYED_PARAMS = frozenset({"kernel", "embedding", "positions", "token_types", "latents", "lora_a", "lora_b"})
UNDECAYED_PARAMS = frozenset({"scale", "bias", "log_scale"})


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Build the learning-rate schedule: linear warm-up, then the decay of `config.schedule`.

    Args:
        config: Peak rate, number of warm-up steps, and kind of decay (linear or cosine to 0 at `steps`, or constant).
        steps: Number of steps of the schedule.

    Returns:
        A function of the step, counted from 0.
    """
    decay_steps = max(1, steps - config.warmup_steps)
    decay = {
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, decay_steps),
        "constant": lambda: optax.constant_schedule(config.learning_rate),
    }[config.schedule]()
    if not config.warmup_steps:
        return decay
    # The first step has 1 / warmup_steps of the peak rate, not 0. The last warm-up step has the peak rate.
    first_rate, transition_steps = config.learning_rate / config.warmup_steps, max(1, config.warmup_steps - 1)
    warmup = optax.linear_schedule(first_rate, config.learning_rate, transition_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: OptimConfig, steps: int, has_named_adapters: bool = False) -> optax.GradientTransformation:
    """Build the optimizer: global-norm clipping, then AdamW.

    Args:
        config: Learning rate, weight decay and clipping.
        steps: Number of steps of the learning-rate schedule.
        has_named_adapters: Whether adapters with names are trained. Their updates are then counted apart from those of the
            shared parameters, so that each adapter can have a count beside its moments. With one count for all, Adam's bias
            correction would be wrong for an adapter that only every n-th batch trains: until its second moments have
            filled, its steps would be too long by up to sqrt(n).
    """
    adam = optax.scale_by_adam()
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.partition({ADAPTER_STATE: adam, "shared": adam}, _label_adam_groups) if has_named_adapters else adam,
        optax.add_decayed_weights(config.weight_decay, make_decay_mask),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def count_updates(opt_state: Any) -> jax.Array:
    """Return the number of updates that the optimizer has made: the steps without the skipped ones."""
    counts = optax.tree.get_all_with_path(opt_state, "count", lambda path, _: path[-1].tuple_name == "ScaleByScheduleState")
    return counts[0][1]


def _label_adam_groups(params: Any) -> Any:
    """Return the label of each parameter for `optax.partition`: adapters, or parameters that all adapters share."""
    return jax.tree.map_with_path(lambda path, _: ADAPTER_STATE if path[-1].key in ADAPTER_PARAMS else "shared", params)


def make_decay_mask(params: Any) -> Any:
    """Return a tree that is True where weight decay applies.

    Raises:
        ValueError: A parameter has a name that no rule covers, or weight decay would apply to no parameter.
    """

    def is_decayed(path: Any, _: Any) -> bool:
        name = path[-1].key
        if name not in DECAYED_PARAMS | UNDECAYED_PARAMS:
            raise ValueError(f"weight decay has no rule for parameter {jax.tree_util.keystr(path)}")
        return name in DECAYED_PARAMS

    mask = jax.tree_util.tree_map_with_path(is_decayed, params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("weight decay matches no parameter")
    return mask
