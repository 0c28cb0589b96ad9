"""The settings that a resumed run must share with its recorded config, and those that may change.

A run may resume after an upgrade, on other devices, or with other logging. So only settings that change the losses, or that
decide which checkpoint is the best, are compared. These may change:

- `run`: the name, and the directory, so that a run can be moved.
- `mesh`, `model.remat`, `model.remat_policy`, `model.unroll`, `model.attention_kernel` and `gradcache.recompute`: how the same
  values are computed, up to rounding.
- `name`, `catalog` and `equality` of a source: names select stored prompts, the keys of an entry are compared themselves, and
  a run keeps the equality that it has recorded (`keep_recorded_equality`).
- `train.log_every`, `checkpoint_every`, `eval_every`, `keep_checkpoints`, `profile_steps`, `peak_flops`, `loggers` and
  `stall_timeout_s`: what happens between steps.
- `train.on_nan`: only a run that has stopped at a loss that is not finite sees a difference.
- `eval`, except the set that selects the best checkpoint: scores of different sets cannot be ranked. A run without held-out
  sets may add some.

Both configs are compared after parsing: a key that is newer than the run has its default, and a renamed key its new name.
"""

from __future__ import annotations

from typing import Any

from jaxembed.config import Config, StageConfig
from jaxembed.config.stage import StageSections

FREE_SOURCE_KEYS = frozenset({"name", "catalog", "equality"})
FREE_MODEL_KEYS = frozenset({"remat", "remat_policy", "unroll", "attention_kernel"})
FREE_TRAIN_KEYS = frozenset(
    {
        "log_every",
        "checkpoint_every",
        "eval_every",
        "keep_checkpoints",
        "profile_steps",
        "peak_flops",
        "loggers",
        "stall_timeout_s",
        "on_nan",
    }
)


def collect_compared_settings(recorded_config: Config, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a recorded config, and of the config that resumes its run, that must be equal."""
    before, after = _collect_fixed_settings(recorded_config), _collect_fixed_settings(config)
    if not recorded_config.eval.sets:
        del before["eval"], after["eval"]
    return before, after


def _collect_fixed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a resumed run must share, as plain values under the keys of the config file."""
    model = {key: value for key, value in config.model.model_dump(mode="json").items() if key not in FREE_MODEL_KEYS}
    stages = [_collect_fixed_stage_settings(stage) for stage in config.stages]
    stage_settings = stages[0] if len(stages) == 1 else {"stages": stages}
    return {"model": model, **stage_settings, "eval": {"selecting_set": _find_selection_set(config)}}


def _collect_fixed_stage_settings(stage: StageConfig) -> dict[str, Any]:
    sections = stage.model_dump(mode="json", include=set(StageSections.model_fields))
    sources = [
        {key: value for key, value in source.items() if key not in FREE_SOURCE_KEYS} for source in sections["data"]["sources"]
    ]
    sections["data"] = {**sections["data"], "sources": sources}
    del sections["gradcache"]["recompute"]
    return {**sections, "train": {key: value for key, value in sections["train"].items() if key not in FREE_TRAIN_KEYS}}


def _find_selection_set(config: Config) -> dict[str, Any] | None:
    """Return the held-out set whose score selects the best checkpoint. A set has one metric."""
    sets = {held_out.name: held_out.model_dump(mode="json") for held_out in config.eval.sets}
    return sets.get(find_selection_set_name(config))


def find_selection_set_name(config: Config) -> str:
    """Return the name of the held-out set whose score selects the best checkpoint, empty without held-out sets."""
    return config.eval.best.rpartition("/")[0] or next((held_out.name for held_out in config.eval.sets), "")


def keep_recorded_equality(recorded_config: Config, config: Config) -> Config:
    """Return a config whose sources compare texts as those of a recorded config do: another rule would change the examples."""
    stages = [_copy_equality(*pair) for pair in zip(recorded_config.stages, config.stages, strict=True)]
    return config.model_copy(update={"stages": tuple(stages)})


def _copy_equality(recorded_stage: StageConfig, stage: StageConfig) -> StageConfig:
    sources = tuple(
        source.model_copy(update={"equality": recorded_source.equality})
        for recorded_source, source in zip(recorded_stage.data.sources, stage.data.sources, strict=True)
    )
    return stage.model_copy(update={"data": stage.data.model_copy(update={"sources": sources})})
