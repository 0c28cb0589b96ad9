"""Steps of a curation that compute vectors or scores with a model. Imported only if a config has one: JAX starts slowly."""

from __future__ import annotations

import functools
from pathlib import Path

from jaxembed.config.curation import AnyStep, CurateConfig, DuplicatesStepConfig
from jaxembed.config.curation_models import ClusterStepConfig, JudgeConfig, JudgeStepConfig, MineStepConfig
from jaxembed.curation.mining import MiningOptions
from jaxembed.curation.stages import CurationContext
from jaxembed.curation.steps.changes import ChangingStep
from jaxembed.curation.steps.clusters import ClusterStep
from jaxembed.curation.steps.curated_row import PreparedStep
from jaxembed.curation.steps.items import AllRowsStep
from jaxembed.curation.steps.judged_rows import make_judge_step
from jaxembed.curation.steps.mined_rows import MinerModels, MineStep
from jaxembed.curation.steps.semantic_duplicates import SemanticDuplicatesStep
from jaxembed.data.convert import name_files
from jaxembed.hub.causal_judge import open_causal_judge
from jaxembed.hub.cross_encoder import ScorePairs, open_cross_encoder
from jaxembed.hub.folders import find_folder
from jaxembed.hub.frozen_encoder import check_model_exists, open_frozen_encoder
from jaxembed.search.bm25 import check_bm25_installed


def check_models(step: AnyStep) -> None:
    """Raise `UserError` if a step needs a model or a library that does not exist. A hub model is downloaded."""
    if isinstance(step, DuplicatesStepConfig | MineStepConfig | ClusterStepConfig):
        check_model_exists(step.model)
    if isinstance(step, MineStepConfig | JudgeStepConfig) and step.judge is not None and step.judge.kind != "server":
        find_folder(step.judge.model)
    if isinstance(step, MineStepConfig) and "bm25" in step.rankers:
        check_bm25_installed()


def make_all_rows_step(
    step: AnyStep, folder: Path, config: CurateConfig, context: CurationContext
) -> AllRowsStep | ChangingStep:
    """Return a step that decides after it has seen all rows. See `stages.make_all_rows_step`."""
    if isinstance(step, MineStepConfig):
        return make_mine_step(step, config, context)
    if isinstance(step, ClusterStepConfig):
        return ClusterStep(step, folder, open_frozen_encoder(step.model, context.cache), config.seed)
    assert isinstance(step, DuplicatesStepConfig)
    return SemanticDuplicatesStep(step, folder, open_frozen_encoder(step.model, context.cache), config.memory_mb)


def make_mine_step(step: MineStepConfig, config: CurateConfig, context: CurationContext) -> MineStep:
    """Return a step `mine` with its models."""
    options = MiningOptions(
        config=step,
        seed=config.seed,
        keep_negatives=step.keep_negatives,
        rankers=step.rankers,
        memory_mb=config.memory_mb,
        relabel_margin=step.relabel_margin if step.relabel else None,
    )
    judge = open_judge(step.judge, context) if step.judge else None
    models = MinerModels(open_frozen_encoder(step.model, context.cache), judge)
    return MineStep(step, name_files(config.sources, ""), models, options, context.cache)


def prepare_judge_step(step: JudgeStepConfig, context: CurationContext) -> PreparedStep:
    """Return a step `judge`. Its model is loaded with the first pairs."""
    return PreparedStep(make_judge_step(step, functools.cache(lambda: open_judge(step.judge, context))))


def open_judge(config: JudgeConfig, context: CurationContext) -> ScorePairs:
    """Return the function that scores pairs of a query and a document."""
    if config.kind == "server":
        return context.open_server(config, context.cache)
    if config.kind == "causal_lm":
        return open_causal_judge(config, context.cache)
    return open_cross_encoder(config.model, context.cache)
