"""Train steps that the runs of a test process share, so that each is traced once."""

from __future__ import annotations

from typing import Any

import jax

from jaxembed.losses.objectives import VECTOR_OBJECTIVES
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.training.stage import Stage


def share_train_steps() -> None:
    """Let stages with the same settings, model and shardings use the same jitted train step."""
    make_train_step, steps = Stage.make_train_step, {}

    def make_once(self: Stage, model: EmbeddingModel, state: Any) -> Any:
        train = self.config.train
        settings = (self.config.optim, self.schedule_steps, train.on_nan, train.dropout, self.config.gradcache.rows)
        shardings, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
        # Tests may replace an objective.
        key = (
            model.drop_text_fields(),
            repr(self.objectives),
            repr(settings),
            tuple(shardings),
            structure,
            *VECTOR_OBJECTIVES.values(),
        )
        if key not in steps:
            steps[key] = make_train_step(self, model, state)
        return steps[key]

    Stage.make_train_step = make_once
