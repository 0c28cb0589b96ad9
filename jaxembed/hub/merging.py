"""One model out of several of one shape: what they must agree on, and their parameters merged."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from jaxembed.errors import UserError
from jaxembed.hub.base import Base, find_base
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.restore import shapes_and_shardings, text_tokenizer
from jaxembed.model.interpolation import interpolate
from jaxembed.training.run_dir import differences

log = logging.getLogger("jaxembed")

OWN = ("prompts", "max_length")  # of a spec: in what models that are merged may differ
NAMED = 4  # differences that an error names
TOLD = {
    "soup": "The weighted mean of the parameters of these models (a model soup, https://arxiv.org/abs/2203.05482).",
    "slerp": "Each tensor lies on the arc between those of these models (spherical linear interpolation, Shoemake 1985).",
}


def merge_models(
    models: Sequence[str], weights: Sequence[float], method: str, name: str, checkpoint: str = "best"
) -> tuple[Embedder, Card]:
    """The models merged by a method of `interpolation.METHODS`, and the card of the result, which has `name`.

    `weights` sum to 1. Everything but the parameters is the first model's. `UserError` on models that differ in what the
    result can have only once, before any weights are read.
    """
    _check(models, [find_base(model) for model in models])
    opened: list[Embedder] = []  # without parameters

    def parameters(model: str) -> Any:
        embedder = Embedder.load(model, checkpoint=checkpoint)
        opened.append(embedder.with_params({}))
        log.info("%s: %s, weight %.4g", model, embedder.revision, weights[len(opened) - 1])
        return embedder.params

    params = interpolate(map(parameters, models), weights, method)
    first = opened[0]
    placed = jax.device_put(params, shapes_and_shardings(first.model, first.mesh)[1])
    rows = [
        f"| {weight:.4g} | `{Path(model).resolve().name if Path(model).exists() else model}` | {one.revision} |"
        for weight, model, one in zip(weights, models, opened, strict=True)
    ]
    table = "\n".join(["| weight | model | revision |", "|---|---|---|", *rows])
    return dataclasses.replace(first, params=placed, revision=""), Card(name, merged=f"{TOLD[method]}\n\n{table}")


def _check(models: Sequence[str], bases: Sequence[Base]) -> None:
    """`UserError` unless the models have weights, and all of them the first one's shape, tokenizer and spec."""
    for model, base in zip(models, bases, strict=True):
        if base.folder is None:
            raise UserError(f"{model}: a preset has no weights; train it first")
    first = _described(bases[0])
    for model, base in zip(models[1:], bases[1:], strict=True):
        differing = list(islice(differences(first, _described(base)), NAMED))
        if differing:
            raise UserError(f"{model}: cannot be merged with {models[0]}, from which it differs ({'; '.join(differing)})")
        for key in OWN:
            if getattr(base.spec, key) != getattr(bases[0].spec, key):
                log.warning("%s: its %s differs from that of %s, which is kept", model, key, models[0])


def _described(base: Base) -> dict[str, Any]:
    """What models must have in common to be merged. Their parameters' shapes follow from it."""
    tokenizer = text_tokenizer(base.tokenizer(), base.spec, base).hf_tokenizer.backend_tokenizer
    spec = {key: value for key, value in base.spec.model_dump(mode="json").items() if key not in OWN}
    rules = {key: value for key, value in json.loads(tokenizer.to_str()).items() if key not in ("truncation", "padding")}
    return {"decoder": dataclasses.asdict(base.decoder), "spec": spec, "tokenizer": rules}
