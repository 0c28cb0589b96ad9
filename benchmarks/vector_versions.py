"""Scores of a model, of its first layers, and of its quantized vectors."""

from __future__ import annotations

from collections.abc import Sequence

from finished_runs import Scores

from jaxembed import Embedder
from jaxembed.evaluation.heldout import HeldOutSet, score_set
from jaxembed.search.precision import Precision, merge_ranges, simulate_quantization

WHOLE = "whole model"
QUANTIZED: tuple[Precision, ...] = ("int8", "binary")


def list_exits(embedder: Embedder) -> list[int]:
    """Return a third and two thirds of the layers of a model, without 0."""
    layers = embedder.model.transformer.layers
    return sorted({layers // 3, 2 * layers // 3} - {0})


def name_exit(layers: int) -> str:
    """Return the name of the score of the first layers."""
    return f"{layers} layers"


def score_versions(embedder: Embedder, held_out: HeldOutSet, range_texts: Sequence[str]) -> Scores:
    """Return the scores of the whole model, of each exit, and of its vectors in each precision.

    Args:
        embedder: The model.
        held_out: The texts to score it on.
        range_texts: Texts whose vectors give the ranges of int8.
    """
    vectors = [embedder.encode(inputs.texts, inputs.instruction) for inputs in held_out.inputs]
    ranges = merge_ranges(None, embedder.encode(range_texts))
    scores = {WHOLE: held_out.score(vectors).items.score}
    for precision in QUANTIZED:
        sides = [simulate_quantization(side, precision, ranges) for side in vectors]
        scores[precision] = held_out.score(sides).items.score
    for layers in list_exits(embedder):
        scores[name_exit(layers)] = score_set(held_out, embedder.keep_first_layers(layers).encode).items.score
    return scores
