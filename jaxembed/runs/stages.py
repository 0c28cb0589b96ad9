"""The stages of a run: what each trains on, towards what and how, and the state that goes from one to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxembed.devices.mesh import Shards
from jaxembed.devices.placement import replicated_jit, replicated_sharding
from jaxembed.devices import processes
from jaxembed.config import Config, DistillationConfig, InfoNCEConfig, MarginMSEConfig, ObjectiveConfig
from jaxembed.curation.remining import is_mined, write_mined
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.containers import open_container
from jaxembed.data.sampling import PairSampler
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sources import ROW_SCHEMAS, Source
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.errors import UserError
from jaxembed.hub.base import Base
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.restore import base_params, placed_shapes, shapes_and_shardings, text_tokenizer
from jaxembed.hub.frozen_encoder import FrozenEncoder
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel, init_params
from jaxembed.model.lora import ADAPTERS, join, pick_adapter, split, stack_adapters, stacked_shapes
from jaxembed.training.checkpoint import Checkpoints
from jaxembed.training.optim import learning_rate, make_optimizer
from jaxembed.training.step import OBJECTIVES, TrainState


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, opened. `before` steps precede it, `scheduled` of which, its own among them, share its schedule."""

    index: int
    config: Config
    before: int
    plan: BatchPlan
    tokenizer: TextTokenizer
    build: BatchBuilder
    objectives: Objectives
    scheduled: int
    teacher_width: int  # 0 for none

    @property
    def end(self) -> int:
        """The last step, counted through all stages."""
        return self.before + self.config.train.steps

    @property
    def sources(self) -> Sequence[Source]:
        return self.plan.sources

    @property
    def schedule(self) -> optax.Schedule:
        return learning_rate(self.config.optim, self.scheduled)

    def mines_for(self, source: Source) -> bool:
        """Whether the stage begins with finding negatives for a source."""
        return self.config.mine is not None and is_mined(source)

    def needs_hard_negatives(self, source: Source) -> bool:
        """Whether all objectives for a source compare a query with its own negatives alone, which are not to be found first."""
        chosen = self._objectives_of(source)
        alone = all(isinstance(o, InfoNCEConfig) and (o.negatives == "hard" or not source.in_batch) for o in chosen)
        return alone and not self.mines_for(source)

    def needs_teacher_scores(self, source: Source) -> bool:
        """Whether all objectives for a source follow a teacher's scores."""
        return all(isinstance(o, DistillationConfig | MarginMSEConfig) for o in self._objectives_of(source))

    def _objectives_of(self, source: Source) -> list[ObjectiveConfig]:
        return [o for o in self.config.objectives if not o.sources or source.name in o.sources]

    def optimizer(self, several: bool) -> optax.GradientTransformation:
        """That of the stage, for several adapters or none."""
        return make_optimizer(self.config.optim, self.scheduled, several)


def make_stages(
    configs: Sequence[Config],
    plans: Sequence[BatchPlan],
    tokenizer: TextTokenizer,
    model: EmbeddingModel,
    base: Base,
    shards: Shards,
    others: Mapping[str, FrozenEncoder],
) -> list[Stage]:
    """The stages of a run's configs, which train on `plans`; `others` are the guide and the teacher.

    `UserError` where a stage does not fit the model.
    """
    stages: list[Stage] = []
    for index, (config, plan) in enumerate(zip(configs, plans, strict=True)):
        before = stages[-1].end if stages else 0
        spec = model.spec.replace(max_length=config.data.max_length)
        of_stage = text_tokenizer(tokenizer.hf_tokenizer, spec, base)
        build = BatchBuilder(
            plan.sources, of_stage, spec, row_length=config.row_length, hard_negatives=config.data.hard_negatives,
            seed=config.train.seed, shards=shards, adapters=model.adapters, steps_before=before,
            distinct=config.data.batching.no_duplicates,
            guide=others["guide"].encode if config.guide else None,
            teacher=others["teacher"].encode if config.teacher else None,
        )  # fmt: skip
        place = f"stages.{index}." if len(configs) > 1 else ""
        objectives = _objectives(config, model, plan.sources, place)
        scheduled, width = _scheduled(configs, index), others["teacher"].width if config.teacher else 0
        stages.append(Stage(index, config, before, plan, of_stage, build, objectives, scheduled, width))
    return stages


def _scheduled(configs: Sequence[Config], index: int) -> int:
    """The steps of a stage and of those that share its optimizer and schedule."""
    first = max(i for i in range(index + 1) if i == 0 or configs[i].optim.restart)
    last = next((i for i in range(index + 1, len(configs)) if configs[i].optim.restart), len(configs))
    return sum(config.train.steps for config in configs[first:last])


def _objectives(config: Config, model: EmbeddingModel, sources: Sequence[Source], place: str) -> Objectives:
    """What a stage minimises, its keys beginning with `place`; `UserError` where a width or a source they name is not there."""
    widest = max(config.matryoshka.dims, default=0)
    if widest >= model.width:
        raise UserError(
            f"{place}matryoshka.dims names {widest}; expected less than {model.width}, the width of this model's vectors"
        )
    names = [source.name for source in sources]
    for i, objective in enumerate(config.objectives):
        if unknown := [name for name in objective.sources if name not in names]:
            raise UserError(
                f"{place}objectives.{i}.sources names {unknown[0]!r}; expected names of sources: {', '.join(names)}"
            )
    return Objectives(config.objectives, config.matryoshka, names)


def first_state(config: Config, base: Base, model: EmbeddingModel, mesh: Mesh) -> TrainState:
    """The state before the first stage: parameters from the base, random where it has none. There is no optimizer yet."""
    shapes, shardings = shapes_and_shardings(model, mesh)
    key = jax.random.key(config.train.seed)
    params = {} if base.folder is None else flatten_dict(base_params(base, shapes, shardings))
    absent = {path: sharding for path, sharding in flatten_dict(shardings).items() if path not in params}
    params |= flatten_dict(init_params(model, key, unflatten_dict(absent)))
    trained, frozen = split(unflatten_dict(params))
    if count := len(model.adapters):
        stacked = flatten_dict(stacked_shapes(split(placed_shapes(shapes, shardings))[0], count))
        own = unflatten_dict({path: x.sharding for path, x in stacked.items() if path[-1] in ADAPTERS})
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
        trained = join(init_params(model, keys, own), trained)
    rest = replicated_jit(mesh, lambda: {"step": jnp.zeros((), jnp.int32), "key": jax.random.key(config.train.seed)})
    return TrainState(trained, opt_state=None, frozen=frozen, **rest)


def begin_stage(stage: Stage, state: TrainState, model: EmbeddingModel, mesh: Mesh) -> TrainState:
    """The state at the begin of a stage: that at the end of the one before, with a new optimizer unless it shares it.

    An objective that has parameters of its own keeps those that one of its label had before.
    """
    key = jax.random.fold_in(state.key, stage.index)
    before = state.params.get(OBJECTIVES, {})
    drawn = replicated_jit(mesh, partial(stage.objectives.new_params, model.width, stage.teacher_width), key)
    own = {label: before.get(label, params) for label, params in drawn.items()}
    params = {name: part for name, part in state.params.items() if name != OBJECTIVES}
    if own:
        params |= {OBJECTIVES: own}
    opt_state = state.opt_state
    if stage.index == 0 or stage.config.optim.restart:
        count = len(model.adapters)
        one = pick_adapter(params, 0 if count else None)
        opt_state = _fresh(stage.optimizer(bool(count)), one, count, mesh)
    elif own.keys() != before.keys():
        raise UserError(
            f"stages.{stage.index}: optim.restart is no, but its objectives train other parameters than those before; restart"
        )
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def _fresh(optimizer: optax.GradientTransformation, params: Any, count: int, mesh: Mesh) -> Any:
    """The optimizer's state before its first update, placed as the parameters are; stacked for `count` adapters."""

    def init(params: Any) -> Any:
        state = optimizer.init(params)
        return stack_adapters([state] * count) if count else state

    placed = _optimizer_shapes(optimizer, params, count, mesh)
    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, placed))(params)


def _optimizer_shapes(optimizer: optax.GradientTransformation, params: Any, count: int, mesh: Mesh) -> Any:
    """The shapes, with shardings, of what `_fresh` makes; `params` may be shapes too.

    What ends in a parameter's path is placed as that parameter is, the rest is everywhere.
    """
    placed = {tuple(key.key for key in path): x.sharding for path, x in jax.tree.leaves_with_path(params)}
    everywhere = replicated_sharding(mesh)

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        keys = tuple(getattr(key, "key", None) for key in path)
        sharding = next((placed[keys[i:]] for i in range(len(keys)) if keys[i:] in placed), everywhere)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))
    return stacked_shapes(shapes, count) if count else shapes


def state_shapes(optimizer: optax.GradientTransformation, model: EmbeddingModel, mesh: Mesh, own: Any = None) -> TrainState:
    """The shapes, with shardings, of the state that a stage begins with (`first_state`, then `begin_stage`); needs no memory.

    `own` are the shapes of its objectives' parameters.
    """
    everywhere, count = replicated_sharding(mesh), len(model.adapters)
    trained, frozen = split(placed_shapes(*shapes_and_shardings(model, mesh)))
    if own:
        trained |= {OBJECTIVES: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), own)}
    opt_state = _optimizer_shapes(optimizer, trained, count, mesh)
    rest = jax.eval_shape(lambda: {"step": jnp.zeros((), jnp.int32), "key": jax.random.key(0)})
    rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), rest)
    return TrainState(stacked_shapes(trained, count) if count else trained, opt_state, frozen=frozen, **rest)


def with_mined_negatives(stage: Stage, encoder_of: Callable[[str], Embedder], run_dir: Path) -> Stage:
    """A stage whose pairs have the negatives that the model finds as it begins; those that it has found are read again.

    `encoder_of` gives the model under an adapter.
    """
    chosen, sources = stage.config.mine, list(stage.sources)
    if chosen is None:
        return stage
    for number, source in enumerate(stage.sources):
        if not stage.mines_for(source):
            continue
        path = run_dir / "mined" / f"stage-{stage.index}-source-{number}.jsonl"
        if not processes.of_first(bytes([path.exists()]))[0]:
            write_mined(source, chosen, encoder_of(source.config.adapter), stage.config.train.seed, path)
            processes.barrier()
        rows = IndexedRows(open_container(str(path)), ROW_SCHEMAS["pairs"])
        sources[number] = dataclasses.replace(source, sampler=PairSampler(rows, source.sampler.max_positives))
    return dataclasses.replace(stage, build=stage.build.with_sources(sources))


def resume(
    stages: Sequence[Stage], state: TrainState, model: EmbeddingModel, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """The index of the stage to go on in, and the state there: from the last checkpoint, else from `first_state`.

    `UserError` where the data of its stage changed.
    """
    latest = checkpoints.latest()
    cursor = {"stage": 0} if latest is None else checkpoints.cursor(latest)
    index = cursor["stage"]
    for stage in stages[: index + 1]:
        state = begin_stage(stage, state, model, mesh)
    if latest is None:
        return 0, state
    if cursor["plan_hash"] != stages[index].plan.hash:
        raise UserError(
            f"{checkpoints.run_dir}: the training data changed since step {latest}; restore it, or name another run.dir"
        )
    return index, checkpoints.restore(latest, state)
