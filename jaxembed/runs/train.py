"""From a config to a finished run. Reads top to bottom: devices, data, model, state, loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxembed.devices.cpu import retain_freed_memory
from jaxembed.devices.mesh import all_shards, local_shards, logical_axis_table, make_mesh, shard_count
from jaxembed.devices import processes
from jaxembed.files import cache_dir
from jaxembed.config import Config, InfoNCEConfig
from jaxembed.curation.remining import check_reach
from jaxembed.data.batch import text_roles
from jaxembed.data.bpe import train_tokenizer
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.pipeline import iter_batches
from jaxembed.data.schema import Example
from jaxembed.data.sources import Source, open_sources
from jaxembed.data.tokenize import TextTokenizer, load_tokenizer
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import HeldOutSet, RetrievalSet, open_held_out_sets, score_sets
from jaxembed.config.fields import shown
from jaxembed.files import write_json
from jaxembed.hub.base import Base, content_hash, find_base, write_spec
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.restore import text_tokenizer
from jaxembed.hub.frozen_encoder import FrozenEncoder, ZeroEncoder, open_frozen_encoder
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.lora import LoRA, pick_adapter
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.runs.stages import Stage, begin_stage, first_state, make_stages, resume, with_mined_negatives
from jaxembed.training.checkpoint import Checkpoints
from jaxembed.training.mfu import MfuMeter, device_peak, make_mfu_meter
from jaxembed.training.loop import Evaluate, Trainer
from jaxembed.training.metrics import Recorder, Unrecorded, read_metrics
from jaxembed.training.profile import Profile
from jaxembed.training.run_dir import check_alike, note_versions, open_run, record
from jaxembed.training.step import TrainState, make_train_step
from jaxembed.training.shutdown import StopRequest

log = logging.getLogger("jaxembed")

SHOWN = 2  # examples of each source that are printed
SAMPLED = 512  # examples of each source whose tokens are counted
TOKENIZER_TEXTS = 200_000  # texts a new tokenizer is made from, at most


def train(config: Config) -> dict[str, Any]:
    """Runs a config to its last step, from its last checkpoint if it has one.

    Returns the run directory, the last step and loss, and the held-out scores by SET/METRIC: of the last step (`scores`),
    of the model before training (`untrained`) and of BM25 (`bm25`).
    """
    began = time.perf_counter()
    check_alike(config)
    mesh = make_mesh(**dict(config.mesh))
    shards = local_shards(mesh)
    configs = config.in_stages()
    plans, held_out = processes.in_turn(partial(_open_data, config, shards.count))
    best_metric = _best_metric(config, held_out)
    base = find_base(config.model.base)
    logical_axis_table(mesh, base.decoder.axis_sizes)  # a mesh that does not fit is told before anything is written
    spec, lora = _spec(configs, base), _lora(config, base)
    run_dir, tokenizer = processes.in_turn(partial(_open_run, config, base, spec, plans))

    model = EmbeddingModel(base.decoder, spec, _compute(config), lora)
    others = _others(config, run_dir)
    stages = make_stages(configs, plans, tokenizer, model, base, shards, others)
    for stage in stages:
        _check_room(spec, stage)
        if processes.is_first():
            _show_examples(stage)
    checkpoints = Checkpoints(run_dir, config.train.keep_checkpoints)
    index, state = resume(stages, first_state(config, base, model, mesh), model, mesh, checkpoints)
    start = int(state.step)
    _announce(state, mesh, start, stages[-1].end)

    encoder = Embedder(model, {}, tokenizer, mesh, base)
    evaluate = _evaluator(encoder, held_out)
    scores_at_start = _baselines(config, held_out, evaluate, state)
    recorder = Recorder(run_dir, start, stages[-1].end) if processes.is_first() else Unrecorded()
    profile, used = Profile(config.train.profile_steps, run_dir / "profile"), _utilisation(config, model, mesh, state)
    for name, scores in scores_at_start.items():
        recorder.log(0, {f"{name}/{key}": value for key, value in scores.items()})
    retain_freed_memory()  # from here on: what loading gave back is not kept
    try:
        with closing(recorder), closing(checkpoints), closing(profile), StopRequest() as stop, jax.set_mesh(mesh):
            for stage in stages[index:]:
                if int(state.step) == stage.before > 0:
                    state = begin_stage(stage, state, model, mesh)
                stage = with_mined_negatives(stage, partial(_of_adapter, encoder, state.weights), run_dir)
                scored = evaluate if held_out else None
                trainer = _trainer(
                    stage, stages[-1].end, state, model, mesh, scored, best_metric, checkpoints, recorder, profile, used
                )
                done = int(state.step) - stage.before
                recorder.say(_told(stage, len(stages)))
                state = trainer.fit(state, iter_batches(stage.plan, stage.build, done, stage.config.train.steps), stop)
    except OSError as error:  # a full disk, a folder that is not writable any more
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); mend it and run the same command") from error
    processes.barrier()  # what the first one wrote is read by all
    summary = _summary(run_dir, time.perf_counter() - began)
    _show_scores(summary)
    return summary


def _open_data(config: Config, shards: int) -> tuple[list[BatchPlan], list[HeldOutSet]]:
    """The plans of a run's stages, and its held-out sets."""
    plans = [_open(index, of_stage, shards) for index, of_stage in enumerate(config.in_stages())]
    return plans, open_held_out_sets(config.eval.sets, cache_dir())


def _open_run(config: Config, base: Base, spec: EmbeddingSpec, plans: Sequence[BatchPlan]) -> tuple[Path, TextTokenizer]:
    """The run directory, in which the run is recorded, and the run's tokenizer."""
    run_dir = open_run(config)
    tokenizer = _tokenizer(run_dir, base, spec, [source for plan in plans for source in plan.sources])
    _record(run_dir, config, base, spec, plans, tokenizer)
    return run_dir, tokenizer


def open_stages(config: Config, mesh: Mesh) -> tuple[EmbeddingModel, list[Stage]]:
    """The model of a run and its stages, opened but not begun: no weights of the base are read, and nothing is written.

    Where a guide or a teacher belongs to a batch, zeros stand for its vectors.
    """
    shards, configs = all_shards(shard_count(mesh)), config.in_stages()
    plans = [_open(index, of_stage, shards.count) for index, of_stage in enumerate(configs)]
    base = find_base(config.model.base)
    spec = _spec(configs, base)
    model = EmbeddingModel(base.decoder, spec, _compute(config), _lora(config, base))
    tokenizer = _tokenizer(None, base, spec, [source for plan in plans for source in plan.sources])
    others = {role: ZeroEncoder(**vars(other)) for role, other in _opened(config).items()}
    return model, make_stages(configs, plans, tokenizer, model, base, shards, others)


def _compute(config: Config) -> Compute:
    chosen = config.model
    return Compute(jnp.dtype(chosen.dtype), chosen.remat, chosen.unroll, chosen.attention_kernel)


def _open(index: int, config: Config, shards: int) -> BatchPlan:
    """The plan of a stage and its sources; `UserError` where batches cannot be made of them."""
    if config.train.batch_size % shards:
        raise UserError(f"train.batch_size {config.train.batch_size} is not divisible by the {shards} shards of the mesh")
    data, sources = config.data, open_sources(config.data, cache_dir())
    if config.mine is not None:
        check_reach(sources, config.mine, config.train.seed, f"stages.{index}.")
    return BatchPlan(sources, config.train.batch_size, config.train.seed, index, data.batching, data.mixture)


def _others(config: Config, run_dir: Path) -> dict[str, FrozenEncoder]:
    """The guide and the teacher of a run, by role, recorded in the run directory. `UserError` where one has changed."""
    others = _opened(config)
    for role, other in others.items():
        record(run_dir, role, other.identity, f"its {role} changed")
    return others


def _opened(config: Config) -> dict[str, FrozenEncoder]:
    """The same, not recorded; a model that is both is opened once."""
    named = {"guide": config.guide, "teacher": config.teacher}
    opened = {name: open_frozen_encoder(name, cache_dir()) for name in dict.fromkeys(named.values()) if name is not None}
    return {role: opened[name] for role, name in named.items() if name is not None}


def _trainer(
    stage: Stage,
    total: int,
    state: TrainState,
    model: EmbeddingModel,
    mesh: Mesh,
    evaluate: Evaluate | None,
    best_metric: str,
    checkpoints: Checkpoints,
    recorder: Recorder | Unrecorded,
    profile: Profile,
    used: MfuMeter | None,
) -> Trainer:
    """The loop of a stage, which begins with `state`, in a run of `total` steps."""
    config = stage.config
    optimizer = stage.optimizer(several=bool(model.adapters))
    skip, placed = config.train.on_nan == "skip", jax.tree.map(lambda x: x.sharding, state)
    return Trainer(
        config=config.train,
        stage=stage.index,
        before=stage.before,
        total=total,
        mesh=mesh,
        train_step=make_train_step(model, stage.objectives, optimizer, stage.schedule, skip, config.gradcache.rows, placed),
        source_names=[source.name for source in stage.sources],
        evaluate=evaluate,
        best_metric=best_metric,
        checkpoints=checkpoints,
        recorder=recorder,
        plan_hash=stage.plan.hash,
        profile=profile,
        mfu_meter=used,
    )


def _utilisation(config: Config, model: EmbeddingModel, mesh: Mesh, state: TrainState) -> MfuMeter | None:
    """How the log reckons mfu; None where the devices' peak is not known."""
    peak = config.train.peak_flops or device_peak(config.model.dtype)
    if peak is None:
        return None
    return make_mfu_meter(model.decoder, state.params, state.frozen, len(model.adapters), peak * mesh.size)


def _spec(stages: Sequence[Config], base: Base) -> EmbeddingSpec:
    """The base's spec with the choices of a run's stages, and the prompts of their sources by name."""
    spec = base.spec.with_choices(stages[-1].model, stages[-1].data.max_length)
    pooled = spec.include_instruction or spec.pool_last_instruction_token
    if not pooled and spec.instruction_template.endswith(" "):
        log.warning("instruction_template ends in a space, which merges into the next word: that word will not be pooled")
    instructions = [item for stage in stages for item in stage.data.instructions().items()]
    return spec.with_prompts(dict(instructions))


def _check_room(spec: EmbeddingSpec, stage: Stage) -> None:
    """`UserError` where a prompt leaves no room for a text of a stage."""
    for name, prompt in spec.prompts.items():
        if stage.tokenizer.max_text_tokens([prompt])[0] < 1:
            raise UserError(
                f"data.max_length is {stage.tokenizer.spec.max_length}, which the {name} prompt {shown(prompt)} and what stands "
                "behind a text fill; raise it, or shorten the instruction"
            )


def _lora(config: Config, base: Base) -> LoRA | None:
    chosen = config.model.lora
    if chosen is not None and base.folder is None:
        raise UserError(f"model.lora: {base.name} has no weights to adapt; name a base that has, or train without model.lora")
    return None if chosen is None else LoRA(**dict(chosen))  # its fields are the keys


def _tokenizer(run_dir: Path | None, base: Base, spec: EmbeddingSpec, sources: Sequence[Source]) -> TextTokenizer:
    """The run's tokenizer: the base's, or for a preset one made from the training texts."""
    kept = run_dir / "tokenizer" if run_dir else None
    if kept and kept.is_dir():
        return text_tokenizer(load_tokenizer(kept), spec, base)
    if base.folder is not None:
        return text_tokenizer(base.tokenizer(), spec, base)
    log.info("making a tokenizer of %s entries from the training texts", f"{base.decoder.vocab_size:,}")
    texts = chain.from_iterable(_texts(source) for source in sources)
    return text_tokenizer(train_tokenizer(islice(texts, TOKENIZER_TEXTS), base.decoder.vocab_size), spec, base)


def _texts(source: Source) -> Any:
    for index in range(len(source)):
        example = source.draw(index, np.random.default_rng(index), 0)
        yield example.query
        yield example.positive


def _record(
    run_dir: Path,
    config: Config,
    base: Base,
    spec: EmbeddingSpec,
    plans: Sequence[BatchPlan],
    tokenizer: TextTokenizer,
) -> None:
    """Writes what identifies the run beside its config: tokenizer, versions, texts, data and base, and how much of the data
    each stage leaves out. `UserError` where a resumed run's data or base is not what it was.
    """
    kept = run_dir / "tokenizer"
    if not kept.is_dir():
        tokenizer.hf_tokenizer.save_pretrained(kept.with_suffix(".partial"))
        kept.with_suffix(".partial").rename(kept)
    note_versions(run_dir)
    if processes.is_first():
        write_spec(run_dir, spec)
        dropped = [{source.name: source.sampler.drop_counts for source in plan.sources} for plan in plans]
        write_json(run_dir / "dropped.json", dropped)
    record(
        run_dir,
        "data_hashes",
        {source.config.path: source.digest for plan in plans for source in plan.sources},
        "its training data changed",
    )
    identity = {"name": base.name, "hash": content_hash(base), "config": dict(base.hf_config)}
    if config.model.lora is not None:
        identity["lora"] = config.model.lora.model_dump(mode="json")
    record(run_dir, "base", identity, "its base changed")  # last: with it the folder is a run for other commands


def _show_examples(stage: Stage) -> None:
    """Prints the first examples of every source as the model will see them, and how many texts are cut.

    `UserError` where no query of them has a loss.
    """
    build, tokenizer = stage.build, stage.tokenizer
    first, without = 0, []
    for source, epochs in zip(stage.sources, stage.plan.epochs(stage.config.train.steps), strict=True):
        ids = np.arange(first, first + min(SAMPLED, len(source)))
        first += len(source)
        examples = build.examples(0, ids)
        texts, prompts = build.texts(examples)
        lengths = tokenizer.count_untruncated_tokens(texts, prompts)
        cut = float(np.mean(lengths > tokenizer.spec.max_length))
        log.info(
            "%s: %s examples, seen %.3g times; a text has %.0f tokens on average, %.1f%% are cut at %d; in-batch negatives %s",
            source.name, f"{len(source):,}", epochs, lengths.mean(), 100 * cut, tokenizer.spec.max_length,
            "on" if source.in_batch else "off",
        )  # fmt: skip
        for reason, dropped in source.sampler.drop_counts.items():
            if dropped:
                log.info("  left out: %s (%s)", f"{dropped:,}", reason)
        if lack := _lack(stage, source, examples):
            without.append(f"{source.name} has {lack}")
            log.warning("  %s: its queries have no loss", without[-1])
        if source.config.few_shot is not None:
            count = np.mean([len(example.few_shot) for example in examples])
            log.info("  %.1f in-context examples a query; a prompt gets half of data.max_length at most", count)
        for example in examples[:SHOWN]:
            texts, prompts = build.texts([example])
            for role, (prompt, text, _) in zip(text_roles(texts), tokenizer.decode_inputs(texts, prompts), strict=True):
                log.info("  %-8s %r", role, (f"[{prompt}] " if prompt else "") + text[:300])
    if len(without) == len(stage.sources):
        raise UserError(f"nothing to train on: {'; '.join(without)}; name other data, or other objectives")


def _lack(stage: Stage, source: Source, examples: Sequence[Example]) -> str:
    """What of the examples of a source is missing without which none of its queries has a loss; empty where nothing is."""
    if stage.needs_hard_negatives(source) and not any(example.negatives for example in examples):
        return "no hard negatives, and nothing else counts for it"
    if stage.needs_teacher_scores(source) and not any(example.teacher_scores for example in examples):
        return "no pos_scores and neg_scores, which all its objectives follow"
    return ""


def _announce(state: TrainState, mesh: Mesh, start: int, end: int) -> None:
    """Prints what the run is, before it begins."""
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.frozen))
    log.info(
        "%s parameters, %s trained, on %d %s device(s)",
        f"{trained + frozen:,}", f"{trained:,}" if frozen else "all", mesh.size, jax.default_backend(),
    )  # fmt: skip
    if start:
        log.info("resuming after step %d of %d", start, end)


def _told(stage: Stage, count: int) -> str:
    """How much a stage does."""
    config, name = stage.config, f"stage {stage.index + 1} of {count}: " if count > 1 else ""
    own = config.data.hard_negatives
    others = config.train.batch_size * (1 + own) - 1 - own
    met = {"all": own + others, "in_batch": others, "hard": own}
    most = [met[o.negatives] for o in config.objectives if isinstance(o, InfoNCEConfig)]
    steps = "1 step" if config.train.steps == 1 else f"{config.train.steps:,} steps"
    told = f"{name}{steps} of {config.train.batch_size:,} queries"
    return told + (f", each against up to {max(most):,} negative documents" if most else "")


def _of_adapter(encoder: Embedder, params: Any, adapter: str) -> Embedder:
    """The model under one adapter, of all parameters; '' where there are not several."""
    names = encoder.model.adapters
    return encoder.with_params(pick_adapter(params, names.index(adapter) if names else None))


def _evaluator(encoder: Embedder, held_out: Sequence[HeldOutSet]) -> Callable[[Any], dict[str, float]]:
    """From all parameters to the scores of every set, each under its adapter."""

    def evaluate(params: Any) -> dict[str, float]:
        scores: dict[str, float] = {}
        for held in held_out:
            scores |= score_sets([held], _of_adapter(encoder, params, held.config.adapter).encode)
        return scores

    return evaluate


def _best_metric(config: Config, held_out: Sequence[HeldOutSet]) -> str:
    """SET/METRIC that picks the best checkpoint; `UserError` where the config names a set that is not there."""
    metrics = [f"{s.config.name}/{s.metric}" for s in held_out]
    named = config.eval.best
    if named and named not in metrics:
        raise UserError(f"eval.best is {named}; expected one of {', '.join(metrics) or 'eval.sets, which is empty'}")
    return named or (metrics[0] if metrics else "")


def _baselines(
    config: Config, held_out: Sequence[HeldOutSet], evaluate: Callable[[Any], dict[str, float]], state: TrainState
) -> dict[str, dict[str, float]]:
    """Scores before the first step: of the untrained model and of BM25. A resumed run has them already."""
    if int(state.step):
        return {}
    scores = {}
    if held_out and config.eval.untrained:
        scores["untrained"] = evaluate(state.weights)
    if config.eval.bm25:
        retrieval = [s for s in held_out if isinstance(s, RetrievalSet)]
        scores["bm25"] = {f"{s.config.name}/{k}": v for s in retrieval for k, v in s.score_bm25().items()}
    for name, values in scores.items():
        log.info("%s: %s", name, ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
    return scores


def _show_scores(summary: Mapping[str, Any]) -> None:
    """Prints the held-out scores side by side, a line each."""
    columns = {name: summary[key] for name, key in (("untrained", "untrained"), ("BM25", "bm25"), ("trained", "scores"))}
    shown = [name for name, scores in columns.items() if scores]
    if summary["scores"]:
        log.info("%-32s %s", "held-out", " ".join(f"{name:>10}" for name in shown))
    for key in summary["scores"]:
        values = (columns[name].get(key) for name in shown)
        log.info("%-32s %s", key, " ".join(f"{'-' if value is None else f'{value:.4f}':>10}" for value in values))


def _summary(run_dir: Path, seconds: float) -> dict[str, Any]:
    """The run's result, out of its own metrics."""
    rows = read_metrics(run_dir)
    losses = [row for row in rows if "loss" in row]

    def last(prefix: str) -> dict[str, float]:
        scored = [row for row in rows if any(key.startswith(prefix + "/") for key in row)]
        return {k.removeprefix(prefix + "/"): v for k, v in scored[-1].items() if k.startswith(prefix)} if scored else {}

    return {
        "run_dir": str(run_dir),
        "step": losses[-1]["step"] if losses else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "scores": last("eval"),
        "untrained": last("untrained"),
        "bm25": last("bm25"),
        "seconds": round(seconds, 1),
    }
