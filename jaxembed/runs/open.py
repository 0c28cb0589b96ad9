"""Open a run: check and assemble everything that training and planning need."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxembed.config import Config, EmbeddingSpec, StageConfig
from jaxembed.config.fields import quote_value
from jaxembed.curation.remining import check_miner_exists
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.sources import Source
from jaxembed.data.tokenize import TextTokenizer, load_tokenizer
from jaxembed.devices import processes
from jaxembed.devices.mesh import Shards, count_shards, find_local_shards, make_all_shards, make_logical_axis_table
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import HeldOutSet, open_held_out_sets
from jaxembed.files import cache_dir, name_in_errors
from jaxembed.formats.run_files import TOKENIZER_FOLDER
from jaxembed.hub.base import Base
from jaxembed.hub.frozen_encoder import FrozenEncoder, ZeroEncoder
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import read_recorded_spec
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.losses.exits import check_exits
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.lora import check_targets_exist
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.encoders import open_encoders
from jaxembed.runs.plans import StagePlans, open_plans
from jaxembed.runs.ranges import apply_ranges, open_ranges
from jaxembed.runs.token_data import check_token_objectives, make_token_builders
from jaxembed.search.bm25 import check_bm25_installed
from jaxembed.training.loggers import check_loggers_installed
from jaxembed.training.run_dir import check_run_dir, create_run_dir
from jaxembed.training.run_lock import RunLock
from jaxembed.training.stage import Stage
from jaxembed.training.state import check_optimizers_fit

log = logging.getLogger("jaxembed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run with its parts opened. No weights are read yet.

    Attributes:
        config: Settings of the run.
        base: What the model starts from.
        mesh: The devices.
        model: The model, without parameters. `model.spec` says how texts become vectors.
        tokenizer: The run's tokenizer, with the maximum length of the last stage.
        stages: The stages, in order.
        encoders: The guide and the teacher, by role.
        held_out: The held-out sets. A planned run has none.
        ranges: Minimum and maximum of each dimension of the vectors, float32 [2, D], for int8. None: not needed.
    """

    config: Config
    base: Base
    mesh: Mesh
    model: EmbeddingModel
    tokenizer: TextTokenizer
    stages: Sequence[Stage]
    encoders: Mapping[str, FrozenEncoder]
    held_out: Sequence[HeldOutSet] = ()
    ranges: np.ndarray | None = None

    @property
    def run_dir(self) -> Path:
        """The directory of the run."""
        return Path(self.config.run.dir)

    @property
    def spec(self) -> EmbeddingSpec:
        """How texts become vectors."""
        return self.model.spec

    @property
    def sources(self) -> list[Source]:
        """The sources of all stages."""
        return [source for stage in self.stages for source in stage.all_sources]

    @property
    def total_steps(self) -> int:
        """The steps of all stages."""
        return self.stages[-1].last_step


def open_run(config: Config, mesh: Mesh, lock: RunLock | None = None) -> OpenedRun:
    """Open what a run needs, and create and lock its directory.

    Cheap checks come first: no data is read before the run directory, the base, and the mesh are known to fit.

    Args:
        config: Settings of the run.
        mesh: The devices.
        lock: The lock of the run directory. None opens the run for planning only: nothing is written, this process builds
            every shard of a batch, and the vectors of guide and teacher are zeros. The mesh may then belong to a
            topology that does not exist here.

    Raises:
        UserError: The run directory, the base, the mesh, the data, or the objectives do not fit together.
    """
    if lock is not None:
        config = check_run_dir(config)
        if config.eval.bm25:
            check_bm25_installed()
        check_loggers_installed(config.train.loggers)
    # Check base, mesh, and model. No data is read.
    base = find_base(config.model.base)
    make_logical_axis_table(mesh, base.transformer.axis_sizes)
    if config.model.lora is not None and not base.has_weights:
        raise UserError(f"model.lora: {base.name} has no weights to adapt. Name a base that has weights, or remove model.lora.")
    if config.model.frozen and not base.has_weights:
        raise UserError(
            f"model.frozen: {base.name} has no weights to keep. Name a base that has weights, or remove model.frozen."
        )
    check_targets_exist(config.model.lora, base.transformer)
    spec = _resolve_spec(config, base, None if lock is None else read_recorded_spec(Path(config.run.dir)))
    check_token_objectives(config, base, spec)
    has_head = config.predicts_tokens and not base.transformer.tie_embeddings
    model = EmbeddingModel(base.transformer, spec, _build_compute_options(config), config.model.lora, has_head)
    shards = make_all_shards(count_shards(mesh)) if lock is None else find_local_shards(mesh)
    for index, stage in enumerate(config.stages):
        _check_stage(stage, model, shards.count, config.get_key_prefix(index))
        _warn_of_long_warmup(config, index)
        if lock is not None:
            check_miner_exists(stage.mine)
    ranges = open_ranges(config, base, model.width)
    encoders = open_encoders(config)
    if lock is None:
        encoders = {role: ZeroEncoder(**vars(encoder)) for role, encoder in encoders.items()}
    # Open the data. Process 0 goes first: it reads the files, and writes indexes for the others to the cache.
    plans = processes.run_on_first_process_first(partial(open_plans, config))
    held_out = (
        () if lock is None else processes.run_on_first_process_first(partial(open_held_out_sets, config.eval.sets, cache_dir()))
    )
    # Create the run directory, now that the data is known to be good, and write a new tokenizer there.
    run_dir = None if lock is None else processes.run_on_first_process_first(partial(create_run_dir, config, lock))
    tokenizer = processes.run_on_first_process_first(partial(_open_tokenizer, run_dir, base, spec, plans))
    stages = _open_stages(config, plans, model, tokenizer, base, shards, encoders)
    check_optimizers_fit(stages, model)
    return OpenedRun(
        config=config,
        base=base,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        stages=apply_ranges(stages, ranges),
        ranges=ranges,
        encoders=encoders,
        held_out=held_out,
    )


def _resolve_spec(config: Config, base: Base, recorded_spec: EmbeddingSpec | None) -> EmbeddingSpec:
    """Return the base's spec with the choices of the config, and the prompts of all sources by name.

    Args:
        config: Settings of the run.
        base: What the model starts from.
        recorded_spec: The spec of the run that is resumed. Earlier versions left instructions out of the pooling by default,
            and their runs continue to do so.
    """
    last_stage = config.stages[-1]
    spec = base.spec.apply_model_config(config.model, last_stage.data.max_length)
    exit_layers = last_stage.exits.list_trained(base.transformer.layers)
    spec = spec.replace(matryoshka_dims=tuple(sorted(last_stage.matryoshka.dims)), exit_layers=exit_layers)
    if recorded_spec is not None and config.model.pooling.include_instruction is None:
        spec = spec.replace(include_instruction=recorded_spec.include_instruction)
    pools_instruction = spec.include_instruction or spec.pool_last_instruction_token
    if not pools_instruction and spec.instruction_template.endswith(" "):
        log.warning(
            "model.instruction_template ends in a space, which merges into the next word. That word will not be pooled."
        )
    instructions: dict[str, tuple[str, str]] = {}
    for stage in config.stages:
        instructions |= stage.data.collect_first_instructions()
    if instructions and spec.fixed_prompts:
        if spec.prompts:
            prompt_list = ", ".join(f"{name} {prompt!r}" for name, prompt in spec.prompts.items())
            raise UserError(
                f"data.sources: {base.name} reads no instructions, because every text has the prompt of its side (found "
                f"instructions of {next(iter(instructions))}; its prompts are {prompt_list}). Remove them, or set "
                "model.instruction_template."
            )
        spec = spec.replace(fixed_prompts=False)
    return spec.add_source_prompts(instructions)


def _build_compute_options(config: Config) -> ComputeOptions:
    """Return the dtype, kernels and memory options of the model."""
    model = config.model
    return ComputeOptions(
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        unroll=model.unroll,
        attention_kernel=model.attention_kernel,
        remat_policy=model.remat_policy,
    )


def _check_stage(stage: StageConfig, model: EmbeddingModel, shards: int, prefix: str) -> None:
    """Raise `UserError` if batches do not fit the shards, widths or exits do not fit the model, or a source is unknown."""
    batch_sizes = {"train.batch_size": stage.train.batch_size} | {
        f"objectives.{i}.batch_size": objective.batch_size
        for i, objective in stage.token_objectives.items()
        if objective.batch_size
    }
    for key, batch_size in batch_sizes.items():
        if batch_size % shards:
            raise UserError(f"{prefix}{key} is {batch_size} (expected a multiple of {shards}, the shards of the mesh)")
    if (widest := max(stage.matryoshka.dims, default=0)) >= model.width:
        raise UserError(
            f"{prefix}matryoshka.dims contains {widest} (expected less than {model.width}, the width of this model's vectors)"
        )
    check_exits(stage.exits, model.transformer.layers, prefix)
    _check_source_names(stage, prefix)


def _check_source_names(stage: StageConfig, prefix: str) -> None:
    """Raise `UserError` if an objective or `mine` names a source that the stage does not have."""
    names_by_key = {f"objectives.{i}.sources": objective.sources for i, objective in enumerate(stage.objectives)}
    if stage.mine is not None:
        names_by_key["mine.sources"] = stage.mine.sources
    names = [source.display_name for source in stage.data.sources]
    for key, chosen_names in names_by_key.items():
        if unknown := [name for name in chosen_names if name not in names]:
            raise UserError(f"{prefix}{key} contains {unknown[0]!r} (expected names of sources: {', '.join(names)})")


def _warn_of_long_warmup(config: Config, index: int) -> None:
    """Warn if the warm-up of a stage is longer than its schedule."""
    warmup, steps = config.stages[index].optim.warmup_steps, _count_schedule_steps(config.stages, index)
    if warmup > steps:
        log.warning(
            "%soptim.warmup_steps is %d, more than the %d steps of the schedule: the learning rate never reaches its peak",
            config.get_key_prefix(index), warmup, steps,
        )  # fmt: skip


def _open_tokenizer(run_dir: Path | None, base: Base, spec: EmbeddingSpec, plans: Sequence[StagePlans]) -> TextTokenizer:
    """Return the tokenizer in the run directory. If there is none, write that of the base there, and return it.

    A preset has no tokenizer: it trains one on the training texts.
    """
    tokenizer_dir = run_dir / TOKENIZER_FOLDER if run_dir else None
    if tokenizer_dir and tokenizer_dir.is_dir():
        return build_text_tokenizer(load_tokenizer(tokenizer_dir), spec, base)
    texts = chain.from_iterable(_iter_texts(source) for plan in plans for source in plan.sources)
    tokenizer = build_text_tokenizer(base.tokenizer(texts), spec, base)
    if tokenizer_dir:
        _write_tokenizer(tokenizer, tokenizer_dir)
    return tokenizer


def _write_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write a tokenizer to a new folder, completely or not at all."""
    partial_folder = folder.with_suffix(".partial")
    try:
        with name_in_errors(folder):
            tokenizer.hf_tokenizer.save_pretrained(partial_folder)
            partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _iter_texts(source: Source) -> Iterator[str]:
    """Yield the query and a positive of every example of a source."""
    for index in range(len(source)):
        example = source.draw(index, np.random.default_rng(index), 0)
        yield example.query
        yield example.positive


def _open_stages(
    config: Config,
    plans: Sequence[StagePlans],
    model: EmbeddingModel,
    tokenizer: TextTokenizer,
    base: Base,
    shards: Shards,
    encoders: Mapping[str, FrozenEncoder],
) -> list[Stage]:
    """Build the stages. It has seven parameters: no `OpenedRun` that could hold them exists yet."""
    stages: list[Stage] = []
    for index, (stage, plan) in enumerate(zip(config.stages, plans, strict=True)):
        first_step = stages[-1].last_step if stages else 0
        stage_tokenizer = build_text_tokenizer(
            tokenizer.hf_tokenizer, model.spec.replace(max_length=stage.data.max_length), base
        )
        _check_prompts_fit(model.spec.prompts, stage_tokenizer, config.get_key_prefix(index))
        source_names = [source.name for source in plan.queries.sources]
        objectives = Objectives(stage.objectives, stage.matryoshka, source_names, stage.exits, stage.quantization)
        sampler = BatchSampler(
            sources=plan.queries.sources,
            tokenizer=stage_tokenizer,
            hard_negatives=stage.data.hard_negatives,
            seed=stage.train.seed,
            step_offset=first_step,
            no_duplicates=stage.data.batching.no_duplicates,
        )
        batch_builder = BatchBuilder(
            sampler=sampler,
            row_length=stage.row_length,
            shards=shards,
            adapters=model.adapters,
            guide=encoders["guide"].encode if stage.guide else None,
            teacher=encoders["teacher"].encode if stage.teacher else None,
            token_builders=make_token_builders(
                stage, plan.tokens, stage_tokenizer, shards, first_step, config.get_key_prefix(index)
            ),
        )
        stages.append(
            Stage(
                index=index,
                config=stage,
                first_step=first_step,
                schedule_steps=_count_schedule_steps(config.stages, index),
                plan=plan.queries,
                batch_builder=batch_builder,
                tokenizer=stage_tokenizer,
                objectives=objectives,
                teacher_width=encoders["teacher"].width if stage.teacher else 0,
            )
        )
    return stages


def _count_schedule_steps(stages: Sequence[StageConfig], index: int) -> int:
    """Count the steps of a stage and of the adjacent stages that share its optimizer and schedule."""
    first_stage = max(i for i in range(index + 1) if i == 0 or stages[i].optim.restart)
    end_stage = next((i for i in range(index + 1, len(stages)) if stages[i].optim.restart), len(stages))
    return sum(stage.train.steps for stage in stages[first_stage:end_stage])


def _check_prompts_fit(prompts: Mapping[str, str], tokenizer: TextTokenizer, prefix: str) -> None:
    """Raise `UserError` if a prompt leaves no room for a text."""
    for name, prompt in prompts.items():
        if tokenizer.max_text_tokens([prompt])[0] < 1:
            raise UserError(
                f"{prefix}data.max_length is {tokenizer.spec.max_length}, but the {name} prompt {quote_value(prompt)} and the "
                "tokens after a text take all of it. Raise it, or shorten the instruction."
            )
