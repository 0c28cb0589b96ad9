"""Run a PyTorch model in float16 or bfloat16 arithmetic on a CPU, at the speed of float32.

GPUs round the inputs and outputs of a layer to the narrow dtype and accumulate in float32. Here hooks round the weights, inputs
and outputs of every layer, and the layer itself computes in float32. CPUs without native float16 are ten times slower.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass
class Overflow:
    """The first layer with a value too large for the dtype.

    Attributes:
        layer: Name of the layer; empty if none overflowed.
    """

    layer: str = ""


@contextlib.contextmanager
def round_layers(model: nn.Module, dtype: torch.dtype) -> Iterator[Overflow]:
    """Round weights, inputs and outputs of the layers of a float32 model to a narrower dtype, and back.

    Args:
        model: The model.
        dtype: float16 or bfloat16.

    Yields:
        The first overflow, as far as the model has run.
    """
    overflow, handles = Overflow(), []
    for name, layer in model.named_modules():
        if not any(layer.children()):
            rounding = _LayerRounding(name, dtype, overflow)
            handles += [layer.register_forward_pre_hook(rounding.enter), layer.register_forward_hook(rounding.leave)]
    try:
        yield overflow
    finally:
        for handle in handles:
            handle.remove()


class _LayerRounding:
    """The two hooks of a layer. Its weights are rounded only while it runs, so that one layer is copied at a time."""

    def __init__(self, name: str, dtype: torch.dtype, overflow: Overflow):
        self.name, self.dtype, self.overflow = name, dtype, overflow
        self.weights: dict[str, torch.Tensor] = {}

    def enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Round the weights and the inputs."""
        for key, parameter in layer.named_parameters(recurse=False):
            self.weights[key] = parameter.data
            parameter.data = self._round(parameter.data)
        return tuple(self._round(x) for x in inputs)

    def leave(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Restore the weights, and round the outputs."""
        for key, parameter in layer.named_parameters(recurse=False):
            parameter.data = self.weights.pop(key)
        return tuple(map(self._round, output)) if isinstance(output, tuple) else self._round(output)

    def _round(self, x: Any) -> Any:
        """Return a float32 tensor rounded to the dtype; anything else unchanged."""
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        rounded = x.to(self.dtype).float()
        if not self.overflow.layer and bool((rounded.isinf() & x.isfinite()).any()):
            self.overflow.layer = self.name
        return rounded
