"""Scoring a run on its held-out sets: under which adapter, by which metric, beside which baselines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from jaxembed.config import Config
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import HeldOutSet, RetrievalSet, score_sets
from jaxembed.hub.embedder import Embedder
from jaxembed.model.lora import pick_adapter
from jaxembed.training.step import TrainState

log = logging.getLogger("jaxembed")


def with_adapter(encoder: Embedder, params: Any, adapter: str) -> Embedder:
    """Return the encoder with the parameters of one adapter.

    Args:
        encoder: The model of a run.
        params: All parameters of the model, those of several adapters stacked.
        adapter: Name of the adapter. It is ignored if the model has no named ones.
    """
    names = encoder.model.adapters
    return encoder.with_params(pick_adapter(params, names.index(adapter) if names else None))


def make_evaluator(encoder: Embedder, held_out: Sequence[HeldOutSet]) -> Callable[[Any], dict[str, float]]:
    """Return a function from all parameters to the scores of every set by SET/METRIC, each under its own adapter."""

    def evaluate(params: Any) -> dict[str, float]:
        scores: dict[str, float] = {}
        for held_out_set in held_out:
            encode = with_adapter(encoder, params, held_out_set.config.adapter).encode
            scores |= score_sets([held_out_set], encode)
        return scores

    return evaluate


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


def score_baselines(
    config: Config, held_out: Sequence[HeldOutSet], evaluate: Callable[[Any], dict[str, float]], state: TrainState
) -> dict[str, dict[str, float]]:
    """Score the untrained model and BM25 before the first step. A resumed run has recorded these scores already."""
    if int(state.step):
        return {}
    scores = {}
    if held_out and config.eval.untrained:
        scores["untrained"] = evaluate(state.weights)
    if config.eval.bm25:
        retrieval = [held_out_set for held_out_set in held_out if isinstance(held_out_set, RetrievalSet)]
        scores["bm25"] = {f"{s.config.name}/{metric}": value for s in retrieval for metric, value in s.score_bm25().items()}
    for name, values in scores.items():
        log.info("%s: %s", name, ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    return scores
