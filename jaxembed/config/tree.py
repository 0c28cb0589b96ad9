"""The whole configuration: reading a file, command-line overrides, and the stages of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from jaxembed.config.data import SourceConfig
from jaxembed.config.model import ModelConfig
from jaxembed.config.names import check_names
from jaxembed.config.removed import upgrade_run_tree
from jaxembed.config.sections import Section, parse_section, read_tree
from jaxembed.config.shipped import find_config
from jaxembed.config.stage import RUN_TRAIN_KEYS, StageConfig, StageSections, resolve_stage
from jaxembed.config.training import EvalConfig, MeshConfig, RunConfig


class RunSections(Section):
    """The sections `run` and `model`. `Config` inherits from it last, so that they come first in files and tables."""

    run: RunConfig = RunConfig()
    model: ModelConfig


class Config(StageSections, RunSections):
    """The whole tree of settings. `load_config` reads one from a YAML file.

    The sections of a stage (data, objectives, ...) hold the defaults of all stages here. `stages` holds every stage with
    its defaults resolved, and has at least one entry: a file without stages has one.
    """

    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    stages: tuple[StageConfig, ...] = Field(
        (),
        json_schema_extra={"nested_rows": False},
        description="Stages, trained one after the other. Each entry lists its differences from the rest of the file: keys of "
        "data, objectives, matryoshka, exits, quantization, gradcache, mine, optim, and train. Each sets its own train.steps.",
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_stages(cls, tree: Any) -> Any:
        """Replace the entries of `stages`, which only list changes, with complete stages."""
        stages = tree.get("stages") if isinstance(tree, dict) else None
        if not isinstance(stages, list | tuple) or not stages or isinstance(stages[0], Section):
            return tree
        train = tree.get("train")
        if isinstance(train, dict) and "steps" in train:
            raise ValueError("train.steps and stages exclude each other. Give each stage its own train.steps.")
        defaults = {name: tree[name] for name in StageSections.model_fields if name in tree}
        resolved_stages = [resolve_stage(defaults, s, i) if isinstance(s, dict) else s for i, s in enumerate(stages)]
        return {**tree, "stages": resolved_stages}

    @model_validator(mode="after")
    def _add_single_stage(self) -> Config:
        if not self.stages:
            self.check_negatives()
            only = StageConfig.model_construct(**{name: getattr(self, name) for name in StageSections.model_fields})
            object.__setattr__(self, "stages", (only,))
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Config:
        names = self.model.lora.names if self.model.lora else ()
        adapters_by_key = {f"data.sources.{i}.adapter": source.adapter for i, source in enumerate(self.data.sources)}
        adapters_by_key |= {f"eval.sets.{i}.adapter": held_out.adapter for i, held_out in enumerate(self.eval.sets)}
        if len(self.stages) > 1:
            for i, stage in enumerate(self.stages):
                prefix = f"stages.{i}.data.sources"
                adapters_by_key |= {f"{prefix}.{j}.adapter": source.adapter for j, source in enumerate(stage.data.sources)}
        for key, adapter in adapters_by_key.items():
            if names and adapter not in names:
                raise ValueError(f"{key} is {adapter!r} (expected one of model.lora.names: {', '.join(names)})")
            if adapter and not names:
                raise ValueError(f"{key} is {adapter!r}, but model.lora.names is empty. Name the adapters there.")
        trained_adapters = {source.adapter for stage in self.stages for source in stage.data.sources}
        if idle := sorted(set(names) - trained_adapters):
            raise ValueError(
                f"model.lora.names: no source trains {idle[0]!r}. Name it as the adapter of a source, or remove it."
            )
        return self

    @model_validator(mode="after")
    def _check_merging(self) -> Config:
        for i, stage in enumerate(self.stages):
            key = f"{self.get_key_prefix(i)}train.merge_adapters"
            if not stage.train.merge_adapters:
                continue
            if len(self.stages) == 1:
                raise ValueError(f"{key} merges adapters before later stages, but there is one stage. Remove it.")
            if self.model.lora is None:
                raise ValueError(f"{key} merges adapters into the base, but model.lora is not set. Set it, or remove the key.")
            if names := self.model.lora.names:
                raise ValueError(f"{key} merges the only adapter, but model.lora.names has {len(names)}. Remove one of both.")
            if i and not stage.optim.restart:
                raise ValueError(f"{key} starts new adapters, but optim.restart is false. Set optim.restart=true.")
        return self

    @model_validator(mode="after")
    def _check_lazy_embedding(self) -> Config:
        freezing_keys = {"model.lora": self.model.lora is not None, "model.frozen": "embedding" in self.model.frozen}
        freezing_key = next((key for key, is_freezing in freezing_keys.items() if is_freezing), None)
        for i, stage in enumerate(self.stages):
            if stage.optim.lazy_embedding and freezing_key:
                key = f"{self.get_key_prefix(i)}optim.lazy_embedding"
                raise ValueError(f"{key} trains rows of the embedding, but {freezing_key} freezes it. Remove one of both.")
        return self

    @model_validator(mode="after")
    def _check_one_model_per_role(self) -> Config:
        for role in ("guide", "teacher"):
            names = list(dict.fromkeys(name for stage in self.stages for name in stage.list_models_with_role(role)))
            if len(names) > 1:
                raise ValueError(f"objectives name several models as {role} ({', '.join(names)}); a run has one")
        return self

    @property
    def total_steps(self) -> int:
        """The steps of all stages."""
        return sum(stage.train.steps for stage in self.stages)

    @property
    def predicts_tokens(self) -> bool:
        """Whether any objective of any stage predicts tokens."""
        return any(stage.predicts_tokens for stage in self.stages)

    def list_merging_stages(self, last: int) -> tuple[int, ...]:
        """Return the stages, up to `last`, before which the adapters are merged into the base."""
        return tuple(i for i in range(1, last + 1) if self.stages[i].train.merge_adapters)

    @property
    def models_by_role(self) -> dict[str, str]:
        """The guide and the teacher of the run, by role. Roles that no stage fills are absent."""
        return {
            role: name for role in ("guide", "teacher") for stage in self.stages for name in stage.list_models_with_role(role)
        }

    def get_key_prefix(self, index: int) -> str:
        """Return the prefix of a stage's keys in errors; empty in a config of one stage."""
        return f"stages.{index}." if len(self.stages) > 1 else ""

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Return the sources of all stages, each once."""
        return tuple(dict.fromkeys(source for stage in self.stages for source in stage.data.sources))

    def dump(self) -> str:
        """Return the tree as YAML text, defaults included. `load_config` can read it."""
        tree = self.model_dump(mode="json")
        if self._is_single_stage():
            tree["stages"] = []
        else:
            del tree["train"]["steps"]
            for stage in tree["stages"]:
                stage["train"] = {key: value for key, value in stage["train"].items() if key not in RUN_TRAIN_KEYS}
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def _is_single_stage(self) -> bool:
        defaults = {name: getattr(self, name) for name in StageSections.model_fields}
        return len(self.stages) == 1 and dict(self.stages[0]) == defaults


def load_config(path: str | Path, overrides: Sequence[str] = (), base: str | None = None) -> Config:
    """Read a YAML file, apply overrides, and check the result.

    Args:
        path: The YAML file, or the name of a shipped config.
        overrides: Settings of the form `key.sub=value`, applied in order.
        base: Value of `model.base` if the file has none, for callers that only read its data.

    Raises:
        UserError: The file cannot be read, a key is unknown or has a wrong value, or two names are equal (`check_names`).
    """
    path = find_config(path)
    tree = read_tree(path, overrides)
    if base is not None and isinstance(model := tree.setdefault("model", {}), dict):
        model.setdefault("base", base)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = run.get("name") or path.stem
        if isinstance(run["name"], str):
            run["dir"] = run.get("dir") or f"runs/{run['name']}"
    config = parse_config(tree, str(path))
    check_names(config, str(path))
    return config


def read_run_config(path: Path) -> Config:
    """Read the config that a run recorded. Keys that were removed since are translated, and new keys get their defaults."""
    return parse_config(upgrade_run_tree(read_tree(path)), str(path))


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Check a nested mapping against the tree.

    Args:
        tree: The settings.
        where: Their origin, which starts an error's line.

    Raises:
        UserError: A key is unknown or has a wrong value.
    """
    return parse_section(Config, tree, where)
