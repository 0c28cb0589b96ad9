"""Score a run and its baselines on the held-out sets, each with its adapter, prompt and metric."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxembed.config import Config
from jaxembed.errors import UserError
from jaxembed.evaluation.bootstrap import compute_standard_error
from jaxembed.evaluation.heldout import HeldOutSet, RetrievalSet, SetScores, select_training_scores
from jaxembed.hub.embedder import Embedder
from jaxembed.model.lora import pick_adapter
from jaxembed.runs.open import OpenedRun
from jaxembed.search.precision import simulate_quantization
from jaxembed.training.step import TrainState

log = logging.getLogger("jaxembed")


def use_adapter(encoder: Embedder, params: Any, adapter: str) -> Embedder:
    """Return the encoder with the parameters of one adapter.

    Args:
        encoder: The model of a run.
        params: All parameters of the model. Those of several adapters are stacked.
        adapter: Name of the adapter. It is ignored if the model has no named adapters.
    """
    names = encoder.model.adapters
    return encoder.with_params(pick_adapter(params, names.index(adapter) if names else None))


ScoreSets = Callable[[Any], Mapping[str, SetScores]]  # all parameters -> scores by name of the set


def make_set_scorer(encoder: Embedder, held_out: Sequence[HeldOutSet], ranges: np.ndarray | None = None) -> ScoreSets:
    """Return a function that scores every set, given all parameters. A set is scored with its own adapter and precision.

    Args:
        encoder: The model.
        held_out: The sets.
        ranges: Minimum and maximum of each dimension of its vectors, [2, D], for sets that are scored at int8.
    """

    def score_sets(params: Any) -> dict[str, SetScores]:
        scores = {}
        for held_out_set in held_out:
            adapted = use_adapter(encoder, params, held_out_set.config.adapter)
            precision = held_out_set.config.precision
            vectors = [
                simulate_quantization(adapted.encode(part.texts, prompt=part.build_prompt(adapted.spec)), precision, ranges)
                for part in held_out_set.inputs
            ]
            scores[held_out_set.config.name] = held_out_set.score(vectors)
        return scores

    return score_sets


def flatten_scores(held_out: Sequence[HeldOutSet], results: Mapping[str, SetScores]) -> dict[str, float]:
    """Return the scores that are logged during training by SET/METRIC."""
    scores: dict[str, float] = {}
    for held_out_set in held_out:
        scores |= select_training_scores(held_out_set, results[held_out_set.config.name])
    return scores


def make_evaluator(
    encoder: Embedder, held_out: Sequence[HeldOutSet], ranges: np.ndarray | None = None
) -> Callable[[Any], dict[str, float]]:
    """Return a function that maps all parameters to scores by SET/METRIC. Arguments: see `make_set_scorer`."""
    score_sets = make_set_scorer(encoder, held_out, ranges)
    return lambda params: flatten_scores(held_out, score_sets(params))


def choose_best_metric(config: Config, held_out: Sequence[HeldOutSet]) -> str:
    """Return the SET/METRIC whose maximum selects the best checkpoint, or an empty string without held-out sets.

    Raises:
        UserError: `eval.best` names a set or metric that does not exist.
    """
    metrics = [f"{held_out_set.config.name}/{held_out_set.metric}" for held_out_set in held_out]
    best = config.eval.best
    if best and best not in metrics:
        raise UserError(f"eval.best is {best} (expected one of {', '.join(metrics) or 'eval.sets, which is empty'})")
    if not best and len(metrics) > 1:
        log.info("eval.best is not set: %s, of the first set, selects the best checkpoint", metrics[0])
    return best or (metrics[0] if metrics else "")


def score_baselines(run: OpenedRun, encoder: Embedder, state: TrainState) -> dict[str, dict[str, float]]:
    """Score the untrained model and BM25 before the first step. A resumed run has recorded these scores already.

    Returns:
        Scores by SET/METRIC, by the name of the baseline: `untrained`, `bm25`, and `noise`, the standard errors of the main
        scores of the untrained model.
    """
    if int(state.step):
        return {}
    scores: dict[str, dict[str, float]] = {}
    config, held_out = run.config, run.held_out
    if held_out and config.eval.untrained:
        results = make_set_scorer(encoder, held_out, run.ranges)(state.weights)
        scores["untrained"] = flatten_scores(held_out, results)
        scores["noise"] = {
            f"{s.config.name}/{s.metric}": compute_standard_error(results[s.config.name].items) for s in held_out
        }
    if config.eval.bm25:
        scores["bm25"] = {}
        for held_out_set in held_out:
            if isinstance(held_out_set, RetrievalSet):
                scores["bm25"] |= select_training_scores(held_out_set, held_out_set.score_bm25())
    for name, values in scores.items():
        label = "standard errors of these scores" if name == "noise" else name
        log.info("%s: %s", label, ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    return scores
