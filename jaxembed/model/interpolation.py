"""Interpolation between the parameters of models of the same shape: linear (soup) or spherical (slerp).

Each tensor is interpolated separately; tensors that are stacked over the layers are first split into layers.

- A soup is the weighted mean (Wortsman et al. 2022, arXiv:2203.05482; for embedding models Xiao et al. 2023, LM-Cocktail,
  arXiv:2311.13534).
- Slerp (Shoemake 1985; Qwen3-Embedding merges its checkpoints this way, arXiv:2506.05176) rotates the direction of one
  tensor into that of the other. The formula is for unit vectors; here the length is interpolated linearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float32

STACKED_LAYERS = ("decoder", "layers")  # path of the parameters that are stacked over the layers
FLOAT64_CHUNK = 1 << 22  # elements per float64 chunk
MIN_COSINE_GAP = 1e-8  # of 1 - |cosine| for slerp; below it, line and arc agree in float32, or the arc is undefined

Tensor = Float32[np.ndarray, "*n"]


def compute_linear_weights(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    """Return the weights of `a` and `b` at the point `t` (0 to 1) on the line from `a` to `b`."""
    return 1 - t, t


def compute_slerp_weights(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    """Return the weights of `a` and `b` at the point `t` (0 to 1) on the arc from `a` to `b`.

    Zero tensors and tensors that point in the same or in opposite directions are interpolated linearly.
    """
    # The angle between the tensors as vectors.
    length_a, length_b = math.sqrt(_dot(a, a)), math.sqrt(_dot(b, b))
    if not length_a or not length_b:
        return compute_linear_weights(a, b, t)
    cosine = _dot(a, b) / (length_a * length_b)
    if 1 - abs(cosine) < MIN_COSINE_GAP:
        return compute_linear_weights(a, b, t)
    angle, length = math.acos(cosine), (1 - t) * length_a + t * length_b
    # Slerp of the unit vectors: sin((1 - t) angle) / sin(angle) and sin(t angle) / sin(angle).
    unit_weight_a, unit_weight_b = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    # From unit vectors to tensors: divide by the old length, multiply by the interpolated one.
    return unit_weight_a * length / length_a, unit_weight_b * length / length_b


METHODS: Mapping[str, Callable[[Tensor, Tensor, float], tuple[float, float]]] = MappingProxyType(
    {"soup": compute_linear_weights, "slerp": compute_slerp_weights}
)


def interpolate(models: Iterator[Any], weights: Sequence[float], method: str) -> Any:
    """Merge models in their order and return the float32 parameters as NumPy arrays.

    Each model i moves the merged result toward itself by t = weights[i] / (weights[0] + ... + weights[i]). For soups, this is
    the weighted mean of all models. Sums are computed in float64.

    Args:
        models: Parameters of each model. If the iterator loads them lazily, only the result and one model are in memory.
        weights: Weight of each model. They need not sum to 1.
        method: A key of `METHODS`.
    """
    merged = jax.tree.map(lambda x: np.array(x, np.float32, order="C"), next(models))
    for i in range(1, len(weights)):
        params = next(models)  # `zip` would keep the previous model in memory while the next one loads
        if weights[i]:
            _move_toward(merged, params, weights[i] / sum(weights[: i + 1]), method)
        del params
    return merged


def _move_toward(merged: Any, params: Any, t: float, method: str) -> None:
    """Replace `merged`, in place, by the point at `t` (0 to 1) between it and `params`."""
    merged_tensors, tensors = flatten_dict(merged), flatten_dict(params)
    assert merged_tensors.keys() == tensors.keys()
    for path, x in merged_tensors.items():
        y = np.asarray(tensors[path])
        assert x.shape == y.shape
        is_stacked = path[: len(STACKED_LAYERS)] == STACKED_LAYERS
        for a, b in zip(x, y, strict=True) if is_stacked else [(x, y)]:
            weight_a, weight_b = METHODS[method](a, b, t)
            for chunk, (wide_a, wide_b) in _iter_float64_chunks(a, b):
                a.reshape(-1)[chunk] = weight_a * wide_a + weight_b * wide_b


def _dot(a: Tensor, b: Tensor) -> float:
    """Return the dot product of two tensors as vectors, in float64."""
    return math.fsum(float(wide_a @ wide_b) for _, (wide_a, wide_b) in _iter_float64_chunks(a, b))


def _iter_float64_chunks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray]]]:
    """Yield the flattened tensors chunk by chunk: the slice, and both chunks in float64."""
    for start in range(0, a.size, FLOAT64_CHUNK):
        chunk = slice(start, start + FLOAT64_CHUNK)
        wide_a, wide_b = (x.reshape(-1)[chunk].astype(np.float64) for x in (a, b))
        yield chunk, (wide_a, wide_b)
