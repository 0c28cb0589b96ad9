"""Print the data, the size, the stages, and the scores of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxembed.config import GradedObjectiveConfig, InfoNCEConfig
from jaxembed.data.batch_sampler import assign_roles
from jaxembed.data.equality import normalize_text
from jaxembed.data.schema import Example
from jaxembed.data.scored_pairs import GradedPairSampler
from jaxembed.data.sources import Source
from jaxembed.devices.cpu import is_tuned
from jaxembed.errors import UserError
from jaxembed.model.kernels import resolve_kernel
from jaxembed.runs.open import OpenedRun
from jaxembed.runs.token_report import describe_lengths, describe_rows, show_token_data
from jaxembed.training.metrics import read_metrics
from jaxembed.training.stage import Stage
from jaxembed.training.step import TrainState

log = logging.getLogger("jaxembed")

MAX_SHOWN_EXAMPLES = 2  # examples of each source that are printed
MAX_SHOWN_SOURCES = 20  # sources of a stage whose examples are printed
MAX_SHOWN_TEXTS = 10  # texts of an example that are printed
MEASURED_EXAMPLES = 512  # examples of each source whose tokens are counted
MAX_SHOWN_TEXT_CHARS = 300  # characters of a printed text
LENGTH_BINS = 40  # bins of a histogram of lengths, from 0 to twice the maximum length; longer texts count in the last one


def show_data(stage: Stage) -> list[dict[str, Any]]:
    """Print the size of every source of a stage, how many of its texts are truncated, and its first examples.

    The examples are printed as the model reads them.

    Returns:
        A report about each source (`describe_source`).

    Raises:
        UserError: No query of any source has a loss.
    """
    first_id, problems, reports = 0, [], []
    for number, (source, epochs) in enumerate(
        zip(stage.sources, stage.plan.count_epochs(stage.config.train.steps), strict=True)
    ):
        ids = np.arange(first_id, first_id + min(MEASURED_EXAMPLES, len(source)))
        first_id += len(source)
        examples = stage.batch_builder.sampler.sample(0, ids)
        reports.append(describe_source(stage, source, epochs, examples))
        _show_source(reports[-1])
        if missing := _describe_missing_inputs(stage, source, examples):
            problems.append(f"{source.name} has {missing}")
            log.warning("  %s: its queries have no loss", problems[-1])
        contrasts = any(isinstance(objective, InfoNCEConfig) for objective in stage.list_objectives(source))
        if contrasts and source.in_batch and not have_negatives(examples):
            log.warning(
                "  %s: its first %d examples have one query or one positive between them. Equal texts are never negatives, so "
                "they train at loss 0.", source.name, len(examples),
            )  # fmt: skip
        if number < MAX_SHOWN_SOURCES:
            _show_examples(stage, source, examples)
    if (hidden := len(stage.sources) - MAX_SHOWN_SOURCES) > 0:
        log.info("examples of %d more sources are not shown; see `python -m jaxembed.data preview`", hidden)
    contrasts = any(isinstance(objective, InfoNCEConfig) for objective in stage.config.objectives)
    if contrasts and stage.config.train.batch_size == 1 and not stage.config.data.hard_negatives:
        log.warning("train.batch_size is 1 and data.hard_negatives is 0: a query has no negatives, so its loss is 0")
    if problems and len(problems) == len(stage.sources):
        raise UserError(f"nothing to train on: {'; '.join(problems)}. Name other data, or other objectives.")
    return [*reports, *show_token_data(stage)]


def describe_source(stage: Stage, source: Source, epochs: float, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the entry of a source in `data.json` of a run.

    Args:
        stage: The stage that trains on it.
        source: The source.
        epochs: Number of epochs of the source in the stage.
        examples: Examples whose texts are measured, as the model reads them.

    Returns:
        Name, path, format and sizes; `share` of the stage's queries; what was `dropped`, by reason; and of the measured
        texts their `tokens` with prompts, before truncation: statistics, the share that is truncated, and a histogram. Pairs
        with scores also have `graded`: the range of the scores, and how many pairs are positives.
    """
    tokenizer, train, sampler = stage.tokenizer, stage.config.train, source.sampler
    lengths = tokenizer.count_untruncated_tokens(*stage.batch_builder.sampler.list_texts(examples))
    max_length = tokenizer.spec.max_length
    counts, edges = np.histogram(np.minimum(lengths, 2 * max_length), bins=LENGTH_BINS, range=(0, 2 * max_length))
    grading = {}
    if isinstance(sampler, GradedPairSampler):
        grading = {
            "score_range": sampler.score_range,
            "min_score": source.config.min_score,
            "positives": sampler.positive_count,
        }
    return {
        **describe_rows(source),
        "epochs": epochs,
        "share": epochs * len(source) / (train.steps * train.batch_size),
        "in_batch_negatives": source.in_batch,
        **({"graded": grading} if grading else {}),
        "tokens": {
            **describe_lengths(lengths, max_length),
            "p95": float(np.quantile(lengths, 0.95, method="higher")),
            "truncated": float(np.mean(lengths > max_length)),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        },
    }


def _show_source(report: Mapping[str, Any]) -> None:
    """Print one line about a source, and one for each reason why rows, or parts of rows, were dropped."""
    tokens = report["tokens"]
    log.info(
        "%s (%s): %s examples, %.3g epochs; %.0f tokens per text on average, %.1f%% truncated at %d; in-batch negatives %s",
        report["name"], report["format"], f"{report['examples']:,}", report["epochs"], tokens["mean"],
        100 * tokens["truncated"], tokens["max_length"], "on" if report["in_batch_negatives"] else "off",
    )  # fmt: skip
    if grading := report.get("graded"):
        log.info(
            "  graded: scores from %g to %g; %s pairs have at least min_score, %g, and are positives",
            *grading["score_range"], f"{grading['positives']:,}", grading["min_score"],
        )  # fmt: skip
    for reason, count in report["dropped"].items():
        log.info("  dropped: %s (%s)", f"{count:,}", reason)


def _show_examples(stage: Stage, source: Source, examples: Sequence[Example]) -> None:
    """Print the first examples of a source as the model reads them."""
    if source.config.few_shot is not None:
        count = np.mean([len(example.few_shot) for example in examples])
        log.info("  %.1f in-context examples per query; a prompt gets at most half of data.max_length", count)
    for example in examples[:MAX_SHOWN_EXAMPLES]:
        texts, prompts = stage.batch_builder.sampler.list_texts([example])
        shown, hidden = slice(MAX_SHOWN_TEXTS), len(texts) - MAX_SHOWN_TEXTS
        inputs = stage.tokenizer.decode_inputs(texts[shown], prompts[shown])
        for role, (prompt, text, _) in zip(assign_roles(texts)[shown], inputs, strict=True):
            log.info("  %-8s %r", role, (f"[{prompt}] " if prompt else "") + text[:MAX_SHOWN_TEXT_CHARS])
        if hidden > 0:
            log.info("  and %d more negatives", hidden)


def have_negatives(examples: Sequence[Example]) -> bool:
    """Return whether examples have hard negatives, or texts that differ and so are negatives of each other.

    A single example gives no evidence, so the answer for it is true.
    """
    if len(examples) < 2 or any(example.negatives for example in examples):
        return True
    queries = {normalize_text(example.query) for example in examples}
    return len(queries) > 1 and len({normalize_text(example.positive) for example in examples}) > 1


def _describe_missing_inputs(stage: Stage, source: Source, examples: Sequence[Example]) -> str:
    """Return what the examples of a source lack if none of its queries has a loss, otherwise an empty string."""
    if not (objectives := stage.list_objectives(source)):
        return "no objective: all of them name other sources"
    if all(isinstance(objective, GradedObjectiveConfig) for objective in objectives) and not source.config.graded:
        return "no graded pairs, which all its objectives need"
    if stage.needs_hard_negatives(source) and not any(example.negatives for example in examples):
        return "no hard negatives, and its objectives use nothing else"
    if stage.needs_teacher_scores(source) and not any(example.teacher_scores for example in examples):
        return "no pos_scores and neg_scores, which all its objectives need"
    return ""


def show_size(run: OpenedRun, state: TrainState) -> None:
    """Print the number of parameters and devices, and where a resumed run continues."""
    trained, frozen = count_parameters(state)
    log.info(
        "%s parameters, %s trained, on %d %s device(s); %s",
        f"{trained + frozen:,}", f"{trained:,}" if frozen else "all", run.mesh.size, jax.default_backend(),
        describe_computation(run),
    )  # fmt: skip
    if step := int(state.step):
        log.info("resuming after step %d of %d", step, run.total_steps)


def count_parameters(state: TrainState) -> tuple[int, int]:
    """Return the numbers of trained and of frozen parameters."""
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.frozen))
    return trained, frozen


def describe_computation(run: OpenedRun) -> str:
    """Return the dtypes, the attention kernel, and the library of the matmuls that a run computes with."""
    compute, lora = run.model.compute, run.model.lora
    storage_note = f", base stored in {lora.base_dtype}" if lora is not None else ""
    kernel = resolve_kernel(compute.attention_kernel) + (" (auto)" if compute.attention_kernel == "auto" else "")
    is_blas = compute.dtype == np.float32 and run.mesh.size == 1 and is_tuned(jax.default_backend())
    blas_note = ", large matmuls by BLAS (JAXEMBED_CPU_TUNING=off: by XLA)" if is_blas else ""
    return f"{np.dtype(compute.dtype).name}{storage_note}, attention kernel {kernel}{blas_note}"


def describe_stage(stage: Stage, num_stages: int) -> str:
    """Return one line about the steps, queries, negatives, and predicted texts of a stage, in a run of `num_stages` stages."""
    train, hard = stage.config.train, stage.config.data.hard_negatives
    in_batch = (train.batch_size - 1) * (1 + hard)
    counts = {"all": hard + in_batch, "in_batch": in_batch, "hard": hard}
    negatives = [counts[o.negatives] for o in stage.config.objectives if isinstance(o, InfoNCEConfig)]
    name = f"stage {stage.index + 1} of {num_stages}: " if num_stages > 1 else ""
    steps = "1 step" if train.steps == 1 else f"{train.steps:,} steps"
    parts = []
    if stage.config.compares_vectors:
        negatives_text = f", each with up to {max(negatives):,} negatives" if negatives else ""
        parts.append(f"{train.batch_size:,} queries{negatives_text}")
    token_objectives = stage.objectives.token_configs
    parts += [f"{config.batch_size or train.batch_size:,} texts for {label}" for label, config in token_objectives.items()]
    return f"{name}{steps} of {' and '.join(parts)}"


def show_scores(summary: Mapping[str, Any]) -> None:
    """Print the held-out scores of the untrained model, BM25, and the trained model side by side."""
    keys = {"untrained": "untrained", "BM25": "bm25", "trained": "scores"}
    columns = {name: summary[key] for name, key in keys.items() if summary[key]}
    if summary["scores"]:
        log.info("%-32s %s", "held-out", " ".join(f"{name:>10}" for name in columns))
    for metric in summary["scores"]:
        values = (scores.get(metric) for scores in columns.values())
        log.info("%-32s %s", metric, " ".join(f"{'-' if value is None else f'{value:.4f}':>10}" for value in values))


def summarize_run(run: OpenedRun, seconds: float) -> dict[str, Any]:
    """Return the result of a run, read from its metrics: last step and loss, held-out scores, and duration in seconds."""
    rows = read_metrics(run.run_dir)
    losses = [row for row in rows if "loss" in row]

    def get_last_scores(prefix: str) -> dict[str, float]:
        """Return the scores of the last row with keys under a prefix, without it."""
        scored_rows = [row for row in rows if any(key.startswith(f"{prefix}/") for key in row)]
        last = scored_rows[-1] if scored_rows else {}
        return {key.removeprefix(f"{prefix}/"): value for key, value in last.items() if key.startswith(f"{prefix}/")}

    return {
        "run_dir": str(run.run_dir),
        "step": losses[-1]["step"] if losses else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "scores": get_last_scores("eval"),
        "untrained": get_last_scores("untrained"),
        "bm25": get_last_scores("bm25"),
        "seconds": round(seconds, 1),
    }
