"""The whole configuration: reading a file, overrides, and the stages of a run."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from jaxembed.config.data import DataConfig, SourceConfig
from jaxembed.config.mining import MineConfig
from jaxembed.config.model import ModelConfig
from jaxembed.config.objectives import (
    AnyObjective,
    DistillationConfig,
    GradCacheConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    MatryoshkaConfig,
)
from jaxembed.config.sections import Section, apply_override, parse_section, read_tree
from jaxembed.config.training import EvalConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from jaxembed.errors import UserError


class Config(Section):
    """The whole tree. `load` reads it; fields are documented where they stand."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    objectives: tuple[AnyObjective, ...] = Field((InfoNCEConfig(),), min_length=1)
    matryoshka: MatryoshkaConfig = MatryoshkaConfig()
    gradcache: GradCacheConfig = GradCacheConfig()
    mine: MineConfig | None = Field(
        None, description="as a stage begins, find hard negatives for its pairs with the model as it is then; absent: do not"
    )
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    stages: tuple[dict[str, Any], ...] = Field(
        (),
        description="trained one after the other, each a tree of what differs from the rest of the file: of data, objectives, "
        "matryoshka, gradcache, mine, optim and train; each names its train.steps",
    )

    @model_validator(mode="after")
    def _adapters_are_named(self) -> Config:
        names = self.model.lora.names if self.model.lora else ()
        users = {f"data.sources.{i}.adapter": source.adapter for i, source in enumerate(self.data.sources)}
        idle = sorted(set(names) - set(users.values()))
        for key, adapter in (users | {f"eval.sets.{i}.adapter": s.adapter for i, s in enumerate(self.eval.sets)}).items():
            if names and adapter not in names:
                raise ValueError(f"{key} is {adapter!r}; expected one of model.lora.names: {', '.join(names)}")
            if adapter and not names:
                raise ValueError(f"{key} is {adapter!r}, but model.lora.names is empty; name the adapters there")
        if idle:
            raise ValueError(f"model.lora.names: no source trains {idle[0]}; name it as the adapter of one, or leave it out")
        return self

    @property
    def guide(self) -> str | None:
        """The model that guides the objectives, of any stage; None without one."""
        return next(iter(_named(self.in_stages(), "guide")), None)

    @property
    def teacher(self) -> str | None:
        """The model whose vectors the objectives match, of any stage; None without one."""
        return next(iter(_named(self.in_stages(), "teacher")), None)

    @property
    def row_length(self) -> int:
        return self.data.row_length or self.data.max_length

    def dump(self) -> str:
        """The resolved tree as YAML text, every default spelled out."""
        return yaml.safe_dump(self._tree(), sort_keys=False, allow_unicode=True)

    def in_stages(self, where: str = "stages") -> tuple[Config, ...]:
        """The config of every stage, without `stages`; of one without them, itself. `UserError` says what is off in one."""
        if not self.stages:
            return (self,)
        whole = {key: value for key, value in self._tree().items() if key != "stages"}
        return tuple(_stage(whole, changes, f"{where}.{i}") for i, changes in enumerate(self.stages))

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources of all stages, each once."""
        return tuple(dict.fromkeys(source for stage in self.in_stages() for source in stage.data.sources))

    def _tree(self) -> dict[str, Any]:
        tree = self.model_dump(mode="json")
        if self.stages:
            del tree["train"]["steps"]
        return tree

    @model_validator(mode="after")
    def _mined_negatives_are_drawn(self) -> Config:
        if self.mine is not None and not self.stages and not self.data.hard_negatives:
            raise ValueError("mine finds hard negatives, but data.hard_negatives is 0; set how many of them a query draws")
        return self

    @model_validator(mode="after")
    def _objectives_have_negatives(self) -> Config:
        """Each stage is checked by itself: the whole may lack what a stage brings."""
        for i, objective in enumerate(() if self.stages else self.objectives):
            key, needed = "", 0
            if isinstance(objective, InfoNCEConfig) and objective.mixed_negatives:
                key, needed = "mixed_negatives", 2
            elif isinstance(objective, InfoNCEConfig) and objective.negatives == "hard":
                key, needed = "negatives=hard", 1
            elif isinstance(objective, DistillationConfig | MarginMSEConfig):
                key, needed = objective.name, 1
            if self.data.hard_negatives < needed:
                told = f"objectives.{i}: {key} compares a query's own negatives, but data.hard_negatives is"
                raise ValueError(f"{told} {self.data.hard_negatives}; set it to {needed} or more")
        return self

    @model_validator(mode="after")
    def _stages_have_the_steps(self) -> Config:
        if self.stages and "steps" in self.train.model_fields_set:
            raise ValueError("train.steps and stages do not go together; give each stage its own train.steps")
        return self


def load_config(path: str | Path, overrides: typing.Sequence[str] = (), base: str | None = None) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides, and returns the checked tree; `UserError` says what is off.

    `base` is `model.base` where the file names none: for those who read its data alone.
    """
    path = Path(path)
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    if base is not None and isinstance(model := tree.setdefault("model", {}), dict):
        model.setdefault("base", base)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = run.get("name") or path.stem
        if isinstance(run["name"], str):
            run["dir"] = run.get("dir") or f"runs/{run['name']}"
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Checks a nested dict against the tree, each of its stages too; `where` names its origin in errors."""
    config = parse_section(Config, tree, where)
    stages = config.in_stages(f"{where}: stages")
    for role in ("guide", "teacher"):
        if len(named := _named(stages, role)) > 1:
            raise UserError(f"{where}: objectives name several models as {role} ({', '.join(named)}); a run has one")
    return config


def _named(stages: Sequence[Config], role: str) -> list[str]:
    """The models that the objectives of stages name in a role, each once."""
    names = [getattr(objective, role, None) for stage in stages for objective in stage.objectives]
    return list(dict.fromkeys(name for name in names if name is not None))


# What a stage may not differ in: one model, one run directory, one set of scores, one trace by steps of the run.
OF_THE_RUN = {
    "run", "model", "mesh", "eval", "stages", "train.seed", "train.keep_checkpoints", "train.profile_steps", "train.peak_flops",
}  # fmt: skip


def _stage(whole: dict[str, Any], changes: dict[str, Any], where: str) -> Config:
    """The config of a stage."""
    train = changes.get("train")
    named = {*changes, *(f"train.{key}" for key in (train if isinstance(train, dict) else {}))}
    if shared := sorted(named & OF_THE_RUN):
        raise UserError(f"{where}.{shared[0]}: is one for all stages; set it outside of stages")
    if "train.steps" not in named:
        raise UserError(f"{where}.train.steps is missing; every stage names its own")
    return parse_section(Config, _changed(whole, changes), where)


def _changed(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict with the values of another put in; lists are replaced whole."""
    made = dict(tree)
    for key, value in changes.items():
        before = made.get(key)
        made[key] = _changed(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return made
