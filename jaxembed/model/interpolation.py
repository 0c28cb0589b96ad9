"""Between the parameters of models of one shape: on the straight line (soup) or, for two of them, on the arc (slerp).

Both are taken tensor by tensor, that of each layer by itself. A soup is the weighted mean (Wortsman et al. 2022,
arXiv:2203.05482; of embedders Xiao et al. 2023, LM-Cocktail). On the arc (Shoemake 1985; Qwen3-Embedding merges its
checkpoints so, arXiv:2506.05176) the direction turns evenly from one tensor to the other, and the length, which the formula
for unit vectors leaves open, goes evenly from one to the other too.
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

LAYERS = ("decoder", "layers")  # the parameters below are stacked over the layers
NUMBERS_AT_ONCE = 1 << 22  # that are in float64 together
PARALLEL = 1e-8  # 1 - |cosine| below which line and arc are the same in float32, or the arc is not defined

Tensor = Float32[np.ndarray, "*n"]


def on_line(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    """The shares of `a` and `b` in the point that lies `t` of the way from one to the other."""
    return 1 - t, t


def on_arc(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    """The same on the arc; on the line where a tensor is zero and where they point the same way, or opposite ways."""
    length_a, length_b = math.sqrt(_dot(a, a)), math.sqrt(_dot(b, b))
    if not length_a or not length_b:
        return on_line(a, b, t)
    cosine = _dot(a, b) / (length_a * length_b)
    if 1 - abs(cosine) < PARALLEL:
        return on_line(a, b, t)
    angle, length = math.acos(cosine), (1 - t) * length_a + t * length_b
    of_a, of_b = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return of_a * length / length_a, of_b * length / length_b


METHODS: Mapping[str, Callable[[Tensor, Tensor, float], tuple[float, float]]] = MappingProxyType(
    {"soup": on_line, "slerp": on_arc}
)


def interpolate(models: Iterator[Any], weights: Sequence[float], method: str) -> Any:
    """The float32 parameters, as NumPy arrays, of the models merged in their order; the weights need not sum to 1.

    Each model is put into those before it by its share of their weights, which for soups is the weighted mean of all. The
    result and one model are held at a time, if `models` makes one after the other. Sums are in float64.
    """
    merged = jax.tree.map(lambda x: np.array(x, np.float32, order="C"), next(models))
    for i in range(1, len(weights)):
        params = next(models)  # not from a zip, which keeps the last one while it fetches the next
        if weights[i]:
            _put_in(merged, params, weights[i] / sum(weights[: i + 1]), method)
        del params
    return merged


def _put_in(merged: Any, params: Any, t: float, method: str) -> None:
    """Moves `merged`, in place, `t` of the way to `params`."""
    ours, theirs = flatten_dict(merged), flatten_dict(params)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        y = np.asarray(theirs[path])
        assert x.shape == y.shape
        for a, b in zip(x, y, strict=True) if path[: len(LAYERS)] == LAYERS else [(x, y)]:
            share_a, share_b = METHODS[method](a, b, t)
            for part, (wide_a, wide_b) in _in_float64(a, b):
                a.reshape(-1)[part] = share_a * wide_a + share_b * wide_b


def _dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(float(wide_a @ wide_b) for _, (wide_a, wide_b) in _in_float64(a, b))


def _in_float64(a: Tensor, b: Tensor) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray]]]:
    """Both tensors, flat, a piece at a time: where it is, and it in float64."""
    for start in range(0, a.size, NUMBERS_AT_ONCE):
        part = slice(start, start + NUMBERS_AT_ONCE)
        wide_a, wide_b = (x.reshape(-1)[part].astype(np.float64) for x in (a, b))
        yield part, (wide_a, wide_b)
