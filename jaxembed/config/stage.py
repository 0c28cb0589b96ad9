"""The sections that every stage of a run has: what it trains on, its objectives, and how it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from jaxembed.config.data import DataConfig
from jaxembed.config.mining import MineConfig
from jaxembed.config.objective import ObjectiveConfig
from jaxembed.config.objectives import (
    AnyObjective,
    DistillationConfig,
    ExitsConfig,
    GradCacheConfig,
    GradedObjectiveConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    MatryoshkaConfig,
    QuantizationConfig,
)
from jaxembed.config.sections import Section
from jaxembed.config.token_objectives import TokenObjectiveConfig
from jaxembed.config.training import OptimConfig, TrainConfig


class StageSections(Section):
    """The sections that a stage may set for itself. In `Config` they are the defaults of all stages."""

    data: DataConfig
    objectives: tuple[AnyObjective, ...] = Field((InfoNCEConfig(),), min_length=1)
    matryoshka: MatryoshkaConfig = MatryoshkaConfig()
    exits: ExitsConfig = ExitsConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    gradcache: GradCacheConfig = GradCacheConfig()
    mine: MineConfig | None = Field(
        None,
        description="Before the stage, mine hard negatives for its pairs with the current model. Default: no mining.",
    )
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _set_graded_sources(self) -> StageSections:
        """Set `graded` of the sources to which a graded objective applies, unless the file sets it."""
        graded_objectives = [objective for objective in self.objectives if isinstance(objective, GradedObjectiveConfig)]
        sources = tuple(
            source.model_copy(update={"graded": True})
            if source.graded is None
            and source.format in ("auto", "scored_pairs")
            and any(not objective.sources or source.display_name in objective.sources for objective in graded_objectives)
            else source
            for source in self.data.sources
        )
        if sources != self.data.sources:
            object.__setattr__(self, "data", self.data.model_copy(update={"sources": sources}))
        return self

    def check_negatives(self) -> None:
        """Raise `ValueError` if an objective needs more hard negatives than `data.hard_negatives` draws."""
        count = self.data.hard_negatives
        if self.mine is not None and not count:
            raise ValueError(
                "mine finds hard negatives, but data.hard_negatives is 0. Set it to the number that a query draws."
            )
        for i, objective in enumerate(self.objectives):
            setting, min_count = _find_needed_hard_negatives(objective)
            if count < min_count:
                raise ValueError(
                    f"objectives.{i}: {setting} compares a query with its own negatives, but data.hard_negatives is {count}. "
                    f"Set it to {min_count} or more."
                )

    def list_models_with_role(self, role: str) -> list[str]:
        """Return the models that the objectives name as `guide` or `teacher`, each once."""
        names = [getattr(objective, role, None) for objective in self.objectives]
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def token_objectives(self) -> dict[int, TokenObjectiveConfig]:
        """The objectives that predict tokens, by their index."""
        return {i: objective for i, objective in enumerate(self.objectives) if isinstance(objective, TokenObjectiveConfig)}

    @property
    def compares_vectors(self) -> bool:
        """Whether any objective compares vectors of texts. Otherwise all of them predict tokens."""
        return len(self.token_objectives) < len(self.objectives)

    @property
    def predicts_tokens(self) -> bool:
        """Whether any objective predicts tokens."""
        return bool(self.token_objectives)

    @property
    def row_length(self) -> int:
        """Tokens of a packed row."""
        return self.data.row_length or self.data.max_length

    @property
    def guide(self) -> str | None:
        """The model that guides the objectives of this stage, if any."""
        return next(iter(self.list_models_with_role("guide")), None)

    @property
    def teacher(self) -> str | None:
        """The model whose vectors the objectives of this stage match, if any."""
        return next(iter(self.list_models_with_role("teacher")), None)


class StageConfig(StageSections):
    """One stage, with every default resolved."""

    @model_validator(mode="after")
    def _check_hard_negatives(self) -> StageConfig:
        self.check_negatives()
        return self


# Keys that all stages share: one model, one run directory, one set of scores, one trace by steps of the run.
RUN_SECTIONS = frozenset({"run", "model", "mesh", "eval", "stages"})
RUN_TRAIN_KEYS = frozenset({"seed", "keep_checkpoints", "profile_steps", "peak_flops", "loggers"})


def resolve_stage(defaults: Mapping[str, Any], changes: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return the sections of a stage: the defaults with the changes of the stage merged in, both unchecked.

    Raises:
        ValueError: The stage sets a key that all stages share, or lacks `train.steps`.
    """
    where = f"stages.{index}"
    train = changes.get("train")
    train_keys = set(train) if isinstance(train, Mapping) else set()
    shared_keys = [*sorted(set(changes) & RUN_SECTIONS), *(f"train.{key}" for key in sorted(train_keys & RUN_TRAIN_KEYS))]
    if shared_keys:
        raise ValueError(f"{where}.{shared_keys[0]}: all stages share this key. Set it outside of stages.")
    if "steps" not in train_keys:
        raise ValueError(f"{where}.train.steps is missing. Set it: every stage has its own number of steps.")
    return merge_trees(defaults, changes)


def merge_trees(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested mapping with the values of another merged in. Lists are replaced, not merged."""
    merged = dict(tree)
    for key, value in changes.items():
        default = merged.get(key)
        merged[key] = merge_trees(default, value) if isinstance(default, dict) and isinstance(value, dict) else value
    return merged


def _find_needed_hard_negatives(objective: ObjectiveConfig) -> tuple[str, int]:
    """Return the setting that makes an objective need hard negatives, and the minimum number."""
    if isinstance(objective, InfoNCEConfig) and objective.mixed_negatives:
        return "mixed_negatives", 2
    if isinstance(objective, InfoNCEConfig) and objective.negatives == "hard":
        return "negatives=hard", 1
    if isinstance(objective, DistillationConfig | MarginMSEConfig):
        return objective.name, 1
    return objective.name, 0
