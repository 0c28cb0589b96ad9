"""Merge several models of the same shape into one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from jaxembed.config import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.hub.base import BaseWithWeights
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.identity import read_tokenizer_state
from jaxembed.hub.resolve import find_base_with_weights
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.model.interpolation import interpolate
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.training.run_dir import iter_differences

log = logging.getLogger("jaxembed")

# Fields of a spec in which models may differ; the first model's are used.
FIRST_MODEL_FIELDS = ("prompts", "max_length", "matryoshka_dims", "exit_layers", "instruction_table")
MAX_LISTED_DIFFERENCES = 4
METHOD_DESCRIPTIONS = {
    "soup": "The weighted mean of the parameters of these models (a model soup, https://arxiv.org/abs/2203.05482).",
    "slerp": "Each tensor lies on the arc between those of these models (spherical linear interpolation, Shoemake 1985).",
}


def merge_models(
    models: Sequence[str], weights: Sequence[float], method: str, name: str, checkpoint: str = "best"
) -> tuple[Embedder, Card]:
    """Merge the parameters of several models. Everything else comes from the first one.

    Args:
        models: Names of the models.
        weights: Weight of each model; they sum to 1.
        method: Name of a method of `interpolation.METHODS`.
        name: Name of the result, for its card.
        checkpoint: Checkpoint of runs: best, last, or a step.

    Returns:
        The merged model and its card.

    Raises:
        UserError: The models differ in more than their parameters. This is checked before any weights are read.
    """
    _check_models_match(models, [find_base_with_weights(model) for model in models])
    embedders: list[Embedder] = []  # without parameters, so that memory holds one model at a time

    def load_params(model: str) -> Any:
        embedder = Embedder.load(model, checkpoint=checkpoint)
        embedders.append(embedder.with_params({}))
        log.info("%s: %s, weight %.4g", model, embedder.revision, weights[len(embedders) - 1])
        return embedder.params

    params = interpolate(map(load_params, models), weights, method)
    first = embedders[0]
    _, shardings = compute_shapes_and_shardings(first.model, first.mesh)
    merged = dataclasses.replace(first, params=jax.device_put(params, shardings), revision="", weights_hash="")
    table = _format_table(models, weights, [embedder.revision for embedder in embedders])
    return merged, Card(name, merging=f"{METHOD_DESCRIPTIONS[method]}\n\n{table}")


def _format_table(models: Sequence[str], weights: Sequence[float], revisions: Sequence[str]) -> str:
    """Return a Markdown table of the merged models. Local folders appear by name, not by path."""
    names = [Path(model).resolve().name if Path(model).exists() else model for model in models]
    rows = [
        f"| {weight:.4g} | `{name}` | {revision} |" for weight, name, revision in zip(weights, names, revisions, strict=True)
    ]
    return "\n".join(["| weight | model | revision |", "|---|---|---|", *rows])


def _check_models_match(models: Sequence[str], bases: Sequence[BaseWithWeights]) -> None:
    """Check that all models have the shape, tokenizer and spec of the first one.

    Raises:
        UserError: A model differs.
    """
    first = _collect_shared_properties(bases[0])
    for model, base in zip(models[1:], bases[1:], strict=True):
        differences = list(islice(iter_differences(first, _collect_shared_properties(base)), MAX_LISTED_DIFFERENCES))
        if differences:
            raise UserError(f"{model}: cannot be merged with {models[0]}, because they differ ({'; '.join(differences)}).")
        for key in FIRST_MODEL_FIELDS:
            if getattr(base.spec, key) != getattr(bases[0].spec, key):
                log.warning("%s: %s differs from that of %s, which is used", model, key, models[0])


def _collect_shared_properties(base: BaseWithWeights) -> dict[str, Any]:
    """Return the properties that merged models must share: transformer, tokenizer, and spec without `FIRST_MODEL_FIELDS`."""
    tokenizer_state = read_tokenizer_state(build_text_tokenizer(base.tokenizer(), base.spec, base).hf_tokenizer)
    spec = collect_shared_fields(base.spec)
    return {"transformer": dataclasses.asdict(base.transformer), "spec": spec, "tokenizer": tokenizer_state}


def collect_shared_fields(spec: EmbeddingSpec) -> dict[str, Any]:
    """Return the fields of a spec that merged models must share."""
    return {key: value for key, value in spec.model_dump(mode="json").items() if key not in FIRST_MODEL_FIELDS}
