"""One stage of a run, opened: its data, its objectives, its optimizer, and its train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxembed.config import (
    DistillationConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    ObjectiveConfig,
    StageConfig,
    TokenObjectiveConfig,
)
from jaxembed.data.batch import Batch, BatchBuilder
from jaxembed.data.batch_plan import BatchPlan, list_sources
from jaxembed.data.sources import Source
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.training.optim import make_optimizer, make_schedule
from jaxembed.training.step import Metrics, TrainState, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run.

    Attributes:
        index: Position among the stages of the run.
        config: Settings of the stage.
        first_step: Number of steps of the run before this stage.
        schedule_steps: Number of steps that share the optimizer and the learning-rate schedule, including those of this stage.
        plan: The queries of every batch. It has no sources if all objectives predict tokens.
        batch_builder: Builds a batch from the ids of its queries.
        tokenizer: Tokenizer with the stage's maximum length.
        objectives: The objectives of the stage.
        teacher_width: Width of the teacher's vectors, 0 without a teacher.
    """

    index: int
    config: StageConfig
    first_step: int
    schedule_steps: int
    plan: BatchPlan
    batch_builder: BatchBuilder
    tokenizer: TextTokenizer
    objectives: Objectives
    teacher_width: int = 0

    @property
    def last_step(self) -> int:
        """The last step of this stage, counted through all stages."""
        return self.first_step + self.config.train.steps

    @property
    def sources(self) -> Sequence[Source]:
        """The sources of the stage's queries."""
        return self.plan.sources

    @property
    def plans(self) -> list[BatchPlan]:
        """The plan of the queries, and those of objectives that predict tokens."""
        return [self.plan, *(builder.plan for builder in self.batch_builder.token_builders.values())]

    @property
    def all_sources(self) -> list[Source]:
        """The distinct sources of the stage: of its queries, and of objectives that predict tokens."""
        return list_sources(self.plans)

    @property
    def plan_hash(self) -> str:
        """Hash of all plans of the stage and their data. A resumed run compares it to verify that its batches are the same."""
        return "-".join(plan.hash for plan in self.plans)

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate by number of updates."""
        return make_schedule(self.config.optim, self.schedule_steps)

    def make_optimizer(self, model: EmbeddingModel) -> optax.GradientTransformation:
        """Return the optimizer of this stage for a model."""
        return make_optimizer(self.config.optim, self.schedule_steps, bool(model.adapters))

    def make_train_step(self, model: EmbeddingModel, state: Any) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Return the compiled train step of this stage.

        Args:
            model: The model.
            state: A `TrainState` of arrays or of shapes, whose shardings the step keeps.
        """
        compute = dataclasses.replace(model.compute, dropout=self.config.train.dropout)
        return make_train_step(
            model.clone(compute=compute),
            self.objectives,
            self.make_optimizer(model),
            self.schedule,
            skip_nonfinite=self.config.train.on_nan == "skip",
            lazy_embedding=self.config.optim.lazy_embedding,
            chunk_rows=self.config.gradcache.rows,
            recompute=self.config.gradcache.recompute,
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )

    def init_objective_params(self, model: EmbeddingModel, key: jax.Array) -> Any:
        """Initialize the parameters of the objectives that have any, keyed by objective label."""
        return self.objectives.init_params(model.width, self.teacher_width, key)

    def mines(self, source: Source) -> bool:
        """Return whether the stage starts with mining negatives for a source. Labels and single texts are not mined."""
        mine = self.config.mine
        return mine is not None and source.is_mineable and mine.applies_to(source.name)

    def needs_hard_negatives(self, source: Source) -> bool:
        """Return whether a query of this source has a loss only if its row has hard negatives."""
        hard_only = all(
            isinstance(objective, InfoNCEConfig) and (objective.negatives == "hard" or not source.in_batch)
            for objective in self.list_objectives(source)
        )
        return hard_only and not self.mines(source)

    def needs_teacher_scores(self, source: Source) -> bool:
        """Return whether a query of this source has a loss only if its row has a teacher's scores."""
        objectives = self.list_objectives(source)
        return all(isinstance(o, DistillationConfig | MarginMSEConfig) and o.teacher is None for o in objectives)

    def list_objectives(self, source: Source) -> list[ObjectiveConfig]:
        """Return the objectives that compare vectors of a source."""
        objectives = [o for o in self.config.objectives if not isinstance(o, TokenObjectiveConfig)]
        return [o for o in objectives if not o.sources or source.name in o.sources]
