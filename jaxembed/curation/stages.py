"""The steps of a curation, grouped into stages. A stage is one pass over the rows; an interrupted one is repeated.

A stage applies steps that see one row at a time. It ends with a step that must see all rows, or with the output. The decisions
of such a step are stored, and applied when the next stage reads the rows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxembed.config.curation import (
    AnyStep,
    BalanceStepConfig,
    CleanStepConfig,
    CurateConfig,
    CurriculumStepConfig,
    DecontaminateStepConfig,
    DuplicatesStepConfig,
    FunctionStepConfig,
    LanguageStepConfig,
    NegativesStepConfig,
    QualityStepConfig,
    Side,
)
from jaxembed.config.curation_models import ClusterStepConfig, JudgeConfig, JudgeStepConfig, MineStepConfig
from jaxembed.curation.minhash import import_rensa
from jaxembed.curation.steps.balance import BalanceStep, make_balance_rule
from jaxembed.curation.steps.changes import ChangingStep, make_change_filter, write_changes
from jaxembed.curation.steps.cleaning import make_clean_step
from jaxembed.curation.steps.curated_row import PreparedStep, RowStep, has_side
from jaxembed.curation.steps.curriculum import CurriculumStep
from jaxembed.curation.steps.decontamination import ReadTask, make_decontaminate_step
from jaxembed.curation.steps.exact_duplicates import ExactDuplicatesStep
from jaxembed.curation.steps.items import AllRowsStep, ItemRule, make_duplicates_rule, make_item_filter
from jaxembed.curation.steps.languages import make_language_step
from jaxembed.curation.steps.near_duplicates import NearDuplicatesStep
from jaxembed.curation.steps.negatives import make_negatives_step
from jaxembed.curation.steps.quality import make_quality_step
from jaxembed.curation.steps.user_function import make_function_step
from jaxembed.errors import UserError

DROPPED_FILE, CHANGES_FILE = "dropped.npy", "changes.jsonl"
ENGINE_VERSION = 2  # increase it when the same config gives different results
# Libraries whose versions may change what a step does.
STEP_LIBRARIES = ("ftfy", "py3langid", "rensa")


OpenServer = Callable[[JudgeConfig, Path], Callable[[Sequence[tuple[str, str]]], np.ndarray]]


class CurationStage(NamedTuple):
    """Steps by their index in the config: those that see one row at a time, then one that must see all rows, or None."""

    row_steps: tuple[int, ...]
    all_rows_step: int | None


class CurationContext(NamedTuple):
    """The resources that steps share, besides the config.

    Attributes:
        cache: Folder for row indexes, vectors and scores.
        read_task: Returns the parts of an MTEB task.
        open_server: Opens an LLM server as a judge, given its section and the cache.
    """

    cache: Path
    read_task: ReadTask
    open_server: OpenServer


def needs_all_rows(step: AnyStep) -> bool:
    """Return whether a step decides only after it has seen all rows."""
    return isinstance(step, DuplicatesStepConfig | BalanceStepConfig) or changes_rows(step)


def changes_rows(step: AnyStep) -> bool:
    """Return whether a step changes rows after it has seen all of them, instead of dropping items."""
    return isinstance(step, MineStepConfig | ClusterStepConfig | CurriculumStepConfig)


def needs_model(step: AnyStep) -> bool:
    """Return whether a step computes vectors or scores with a model, which needs JAX."""
    is_semantic = isinstance(step, DuplicatesStepConfig) and step.match == "semantic"
    return is_semantic or isinstance(step, MineStepConfig | JudgeStepConfig | ClusterStepConfig)


def split_into_stages(steps: Sequence[AnyStep]) -> list[CurationStage]:
    """Return the stages of some steps. The last one writes the output."""
    stages, row_steps = list[CurationStage](), list[int]()
    for i, step in enumerate(steps):
        if needs_all_rows(step):
            stages.append(CurationStage(tuple(row_steps), i))
            row_steps = []
        else:
            row_steps.append(i)
    return [*stages, CurationStage(tuple(row_steps), None)]


def prepare_step(step: AnyStep, context: CurationContext) -> PreparedStep:
    """Return a step that sees one row at a time.

    Args:
        step: The section of the step.
        context: The resources that steps share.

    Raises:
        UserError: Something that the step needs is missing.
    """
    if isinstance(step, CleanStepConfig):
        return PreparedStep(make_clean_step(step))
    if isinstance(step, QualityStepConfig):
        return PreparedStep(make_quality_step(step))
    if isinstance(step, LanguageStepConfig):
        return PreparedStep(make_language_step(step))
    if isinstance(step, NegativesStepConfig):
        return PreparedStep(make_negatives_step(step))
    if isinstance(step, DecontaminateStepConfig):
        return make_decontaminate_step(step, context.cache, context.read_task)
    if isinstance(step, JudgeStepConfig):
        from jaxembed.curation import model_steps

        return model_steps.prepare_judge_step(step, context)
    assert isinstance(step, FunctionStepConfig)
    return make_function_step(step)


def check_requirements(step: AnyStep) -> None:
    """Raise `UserError` if a step that must see all rows needs a library or a model that is missing."""
    if isinstance(step, DuplicatesStepConfig) and step.match == "near":
        import_rensa()
    if needs_model(step):
        from jaxembed.curation import model_steps

        model_steps.check_models(step)


def make_all_rows_step(
    step: AnyStep, folder: Path, max_rows: int, config: CurateConfig, context: CurationContext
) -> AllRowsStep | ChangingStep:
    """Return a step that decides after it has seen all rows.

    Args:
        step: The section of the step.
        folder: Empty folder for what the step stores.
        max_rows: Number of rows before the first step.
        config: The whole config.
        context: The resources that steps share.
    """
    if isinstance(step, BalanceStepConfig):
        return BalanceStep(step, folder, max_rows, config)
    if isinstance(step, CurriculumStepConfig):
        return CurriculumStep(step)
    if needs_model(step):
        from jaxembed.curation import model_steps

        return model_steps.make_all_rows_step(step, folder, config, context)
    assert isinstance(step, DuplicatesStepConfig)
    step_class = NearDuplicatesStep if step.match == "near" else ExactDuplicatesStep
    return step_class(step, folder, max_rows, config.memory_mb)


def write_decisions(folder: Path, step: AllRowsStep | ChangingStep) -> None:
    """Let a step that has seen all rows decide, and store its decisions in a folder."""
    if hasattr(step, "iter_changes"):
        write_changes(folder / CHANGES_FILE, step.iter_changes())
    else:
        np.save(folder / DROPPED_FILE, step.find_dropped())


def read_decisions(folder: Path, step: AnyStep) -> RowStep:
    """Return the function that applies the stored decisions of a step. Rows must come in the order in which it saw them."""
    if changes_rows(step):
        return make_change_filter(folder / CHANGES_FILE)
    return make_item_filter(make_item_rule(step), np.load(folder / DROPPED_FILE))


def make_item_rule(step: AnyStep) -> ItemRule:
    """Return the item rule of a step that drops items after it has seen all rows."""
    if isinstance(step, BalanceStepConfig):
        return make_balance_rule(step)
    assert isinstance(step, DuplicatesStepConfig)
    return make_duplicates_rule(step)


def check_sides(config: CurateConfig, formats: Sequence[str]) -> None:
    """Raise `UserError` if a step names a side that no source has.

    Args:
        config: The whole config.
        formats: Format of the rows of each source.
    """
    for i, step in enumerate(config.steps):
        if isinstance(step, NegativesStepConfig | MineStepConfig | JudgeStepConfig) and "pairs" not in formats:
            raise UserError(f"steps.{i} ({step.name}): no source has pairs. Remove the step.")
        sides: Sequence[Side] = getattr(step, "sides", ()) if "sides" in step.model_fields_set else ()
        if isinstance(step, DuplicatesStepConfig) and step.of == "positives":
            sides = ("positives",)
        for side in sides:
            if not any(has_side(format_name, side) for format_name in formats):
                found = ", ".join(sorted(set(formats)))
                raise UserError(f"steps.{i} ({step.name}): no source has {side} (the rows are {found}). Remove the side.")


def compute_stage_digests(
    config: CurateConfig, stages: Sequence[CurationStage], inputs: str, row_steps: Mapping[int, PreparedStep]
) -> list[str]:
    """Return, for each stage, a hash of everything that its result depends on: inputs, seed, and all steps so far.

    Args:
        config: The whole config.
        stages: Its stages.
        inputs: Hash of the sources.
        row_steps: The steps that see one row at a time, by index.
    """
    digest = hashlib.sha256(json.dumps([ENGINE_VERSION, inputs, config.seed, _list_versions()]).encode())
    digests = []
    for stage in stages:
        for i in (*stage.row_steps, *([] if stage.all_rows_step is None else [stage.all_rows_step])):
            digest.update(config.steps[i].model_dump_json().encode())
            digest.update(row_steps[i].digest.encode() if i in row_steps else b"")
        if stage.all_rows_step is None:
            digest.update(config.model_dump_json(include={"format", "metadata"}).encode())
        digests.append(digest.hexdigest())
    return digests


def _list_versions() -> dict[str, str]:
    """Return the versions of the installed libraries of `STEP_LIBRARIES`."""
    versions = {}
    for name in STEP_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
