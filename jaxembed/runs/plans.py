"""The data of every stage: the sources of each objective, and the plans of their batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from jaxembed.config import Config, GradedObjectiveConfig, InfoNCEConfig, StageConfig
from jaxembed.curation.remining import check_mined_sources
from jaxembed.data.batch_plan import BatchPlan, list_sources
from jaxembed.data.scored_pairs import GradedPairSampler
from jaxembed.data.sources import Source, detect_format, open_sources
from jaxembed.errors import UserError
from jaxembed.files import cache_dir


class StagePlans(NamedTuple):
    """The batches of a stage.

    Attributes:
        queries: The queries of every step, for objectives that compare vectors. It has no sources if there are none.
        tokens: The texts of every step, for each objective that predicts tokens, in the order of the objectives.
    """

    queries: BatchPlan
    tokens: Sequence[BatchPlan]

    @property
    def sources(self) -> list[Source]:
        """All sources, each once."""
        return list_sources([self.queries, *self.tokens])


def open_plans(config: Config) -> list[StagePlans]:
    """Open the sources of every stage, and plan its batches.

    Raises:
        UserError: A source cannot be read, or does not fit the objectives of its stage.
    """
    return [_open_stage_plans(config, index) for index in range(len(config.stages))]


def _open_stage_plans(config: Config, index: int) -> StagePlans:
    """Open the sources of a stage, assign them to its objectives, and plan its batches."""
    stage, prefix = config.stages[index], config.get_key_prefix(index)
    _check_scores(stage, prefix)
    sources = open_sources(stage.data, cache_dir())
    token_sources = _assign_token_sources(stage, sources, prefix)
    query_sources = _assign_query_sources(stage, sources, list(chain.from_iterable(token_sources)), prefix)
    _check_positives(stage, query_sources, prefix)
    if stage.mine is not None:
        check_mined_sources(query_sources, stage.mine, stage.train.seed, prefix)
    batching, mixture, seed = stage.data.batching, stage.data.mixture, stage.train.seed
    return StagePlans(
        BatchPlan(query_sources, stage.train.batch_size, seed, index, batching, mixture),
        [
            BatchPlan(own_sources, objective.batch_size or stage.train.batch_size, seed, index, mixture=mixture)
            for own_sources, objective in zip(token_sources, stage.token_objectives.values(), strict=True)
        ],
    )


def _assign_token_sources(stage: StageConfig, sources: Sequence[Source], prefix: str) -> list[list[Source]]:
    """Return the sources of each objective that predicts tokens: those it names, otherwise all of its format.

    Raises:
        UserError: An objective names a source of another format, or has no source.
    """
    source_lists = []
    for i, objective in stage.token_objectives.items():
        source_format, where = objective.source_format, f"{prefix}objectives.{i}: {objective.name}"
        requirement = f"{where} needs sources of format {source_format} ({objective.source_rows})"
        named_sources = [source for source in sources if source.name in objective.sources]
        if mismatched_sources := [source for source in named_sources if source.format != source_format]:
            first = mismatched_sources[0]
            raise UserError(f"{requirement}, but source {first.name} has format {first.format}. Name other sources.")
        own_sources = named_sources or [source for source in sources if source.format == source_format]
        if not own_sources:
            formats = ", ".join(f"{source.name}: {source.format}" for source in sources)
            raise UserError(f"{requirement}, but the stage has none (found {formats}). Add one.")
        source_lists.append(own_sources)
    return source_lists


def _assign_query_sources(
    stage: StageConfig, sources: Sequence[Source], token_sources: Sequence[Source], prefix: str
) -> list[Source]:
    """Return the sources whose queries are compared: all but those of objectives that predict tokens.

    A source that a vector objective names belongs to both.

    Raises:
        UserError: Every source is one of objectives that predict tokens, but others compare vectors.
    """
    if not stage.compares_vectors:
        return []
    vector_objectives = [objective for i, objective in enumerate(stage.objectives) if i not in stage.token_objectives]
    named_sources = {name for objective in vector_objectives for name in objective.sources}
    token_only_names = {source.name for source in token_sources} - named_sources
    query_sources = [source for source in sources if source.name not in token_only_names]
    if not query_sources:
        raise UserError(
            f"{prefix}objectives: no source is left for {vector_objectives[0].name}, because all of them train objectives "
            "that predict tokens. Add a source, or name one in the objective's sources."
        )
    return query_sources


def _check_scores(stage: StageConfig, prefix: str) -> None:
    """Raise `UserError` if a graded objective needs scores that no source has. One row of each source under it is read."""
    graded_objectives = {i: o for i, o in enumerate(stage.objectives) if isinstance(o, GradedObjectiveConfig)}
    named_sources = {name for objective in graded_objectives.values() for name in objective.sources}
    sources = stage.data.sources if graded_objectives else ()
    formats = {s.display_name: detect_format(s) for s in sources if s.graded or s.display_name in named_sources}
    scored_names = {s.display_name for s in sources if s.graded and formats[s.display_name] == "scored_pairs"}
    for i, objective in graded_objectives.items():
        if unscored_names := [name for name in objective.sources if name not in scored_names]:
            problem = f"source {unscored_names[0]} has no scores (format {formats[unscored_names[0]]}; expected scored_pairs)"
            if formats[unscored_names[0]] == "scored_pairs":
                problem = f"source {unscored_names[0]} does not keep its scores (graded is false; expected true)"
            raise UserError(f"{prefix}objectives.{i}: {objective.name} needs scores, but {problem}. Name other sources.")
        if not scored_names:
            raise UserError(
                f"{prefix}objectives.{i}: {objective.name} needs scores, but no source has any (expected a source of rows of "
                "sentence1, sentence2 and score). Add one."
            )


def _check_positives(stage: StageConfig, sources: Sequence[Source], prefix: str) -> None:
    """Raise `UserError` if InfoNCE applies to a graded source without positives."""
    without_positives = [s for s in sources if isinstance(s.sampler, GradedPairSampler) and not s.sampler.positive_count]
    for i, objective in enumerate(stage.objectives):
        for source in without_positives if isinstance(objective, InfoNCEConfig) else ():
            if not objective.sources or source.name in objective.sources:
                raise UserError(
                    f"{prefix}objectives.{i}: infonce needs positives, but no pair of source {source.name} has a score of "
                    f"{source.config.min_score} or more. Lower the source's min_score, or name other sources."
                )
