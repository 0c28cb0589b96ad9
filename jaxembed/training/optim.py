"""AdamW with warm-up, decay and clipping, by optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxembed.config import OptimConfig
from jaxembed.model.lora import ADAPTERS, OWN

DECAYED = frozenset({"kernel", "embedding", "latents", "lora_a", "lora_b"})  # matrices; norm scales and biases are spared
SPARED = frozenset({"scale", "bias", "log_scale"})


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step from 0: linear warm-up, then linear or cosine decay to 0 at `steps`, or none."""
    rest = max(1, steps - config.warmup_steps)
    after = {
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
        "constant": lambda: optax.constant_schedule(config.learning_rate),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    # The first step already moves: it has 1/warmup of the full rate, and the last warm-up step has all of it.
    first, rise = config.learning_rate / config.warmup_steps, max(1, config.warmup_steps - 1)
    warmup = optax.linear_schedule(first, config.learning_rate, rise)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimConfig, steps: int, several: bool = False) -> optax.GradientTransformation:
    """Clips the global gradient norm, then AdamW.

    For `several` adapters it counts their updates apart from those of the rest, so that each can have a count of its own
    beside its moments: by a count of all steps, the steps of an adapter that every n-th batch trains were too long by up to
    sqrt(n), until its second moments have filled.
    """
    adam = optax.scale_by_adam()
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.partition({OWN: adam, "shared": adam}, _owner) if several else adam,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def updates_done(opt_state: Any) -> jax.Array:
    """The updates that the optimizer has made: the steps, less the skipped ones."""
    counts = optax.tree.get_all_with_path(opt_state, "count", lambda path, _: path[-1].tuple_name == "ScaleByScheduleState")
    return counts[0][1]


def _owner(params: Any) -> Any:
    """The group of each parameter: adapters, or what all adapters share."""
    return jax.tree.map_with_path(lambda path, _: OWN if path[-1].key in ADAPTERS else "shared", params)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies. ValueError on a parameter of unknown kind, or if the rule matches nothing."""

    def decayed(path: Any, _: Any) -> bool:
        kind = path[-1].key
        if kind not in DECAYED | SPARED:
            raise ValueError(f"weight decay has no rule for parameter {jax.tree_util.keystr(path)}")
        return kind in DECAYED

    mask = jax.tree_util.tree_map_with_path(decayed, params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("weight decay matches no parameter")
    return mask
