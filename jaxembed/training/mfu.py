"""Model FLOPs utilization (MFU): the share of the devices' peak FLOP/s that the model uses.

Definition: Chowdhery et al. 2022, PaLM, appendix B. It counts the matmuls that the model needs, not those that are recomputed
to save memory:

- Kernels: each useful token takes 6 FLOPs for each weight of the kernels that it passes, 2 forward and 4 backward. A frozen
  kernel takes 4: it needs no gradient.
- Attention: each pair of tokens of one text takes 12 H N L FLOPs (H head width, N heads, L layers). As in PaLM, masks and
  windows do not reduce that.

Padding, embedding lookup, norms, attention to latents, the projection of a text's single vector, loss and optimizer are not
counted. The peak of a device comes from `jaxembed.devices.chips`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from jaxembed.devices.chips import find_chip
from jaxembed.model.families import TransformerConfig
from jaxembed.model.lora import ADAPTER_PARAMS


@dataclasses.dataclass(frozen=True)
class MfuMeter:
    """Turns counts of tokens and seconds into MFU.

    Attributes:
        token_flops: FLOPs of a useful token.
        pair_flops: FLOPs of a pair of tokens in one text.
        peak_flops: FLOP/s of all devices together.
    """

    token_flops: float
    pair_flops: float
    peak_flops: float

    def compute_mfu(self, tokens: int, pairs: int, seconds: float) -> float:
        """Return the MFU, given the useful tokens and token pairs that were computed in `seconds`."""
        return (self.token_flops * tokens + self.pair_flops * pairs) / (seconds * self.peak_flops)


def make_mfu_meter(transformer: TransformerConfig, trained: Any, frozen: Any, adapters: int, peak_flops: float) -> MfuMeter:
    """Build the meter of a model.

    Args:
        transformer: Shape of the transformer.
        trained: The trained parameters, or their shapes.
        frozen: The frozen parameters, or their shapes.
        adapters: Number of adapters that are stacked in `trained`; 0 for none.
        peak_flops: FLOP/s of all devices together.
    """
    token_flops = 6 * count_kernel_weights(trained, adapters) + 4 * count_kernel_weights(frozen)
    return MfuMeter(token_flops, 12 * transformer.head_width * transformer.heads * transformer.layers, peak_flops)


def count_kernel_weights(params: Any, adapters: int = 0) -> int:
    """Count the weights of the kernels that a token passes; of stacked adapters, only one is counted."""
    flat = flatten_dict(params)
    kernels = {
        path: x for path, x in flat.items() if path[0] in ("decoder", "pooling") and path[-1] in ("kernel", *ADAPTER_PARAMS)
    }
    if ("pooling", "latents") in flat:
        kernels.pop(("pooling", "attention", "kv", "kernel"), None)  # applied to the latents once per step, not to tokens
    copies = max(adapters, 1)
    return sum(math.prod(x.shape) // (copies if path[-1] in ADAPTER_PARAMS else 1) for path, x in kernels.items())


def find_device_peak(dtype: str) -> float | None:
    """Return the peak FLOP/s of one device here when it computes in `dtype`, or None if it is not known."""
    chip = find_chip(jax.devices()[0].device_kind)
    return chip.peak_flops if chip is not None and dtype == "bfloat16" else None
