"""How much of the devices' arithmetic a step uses: model FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM, appendix B).

Counted is what the model asks for, not what is recomputed to save memory: of every useful token, a multiplication and an
addition with each number of the kernels it passes, once forward and twice backward, 6 in all; with a frozen kernel, which
needs no gradient of its own, 4. Attention takes 12 H N L of each pair of tokens of one text (H head width, N heads, L
layers). As in PaLM, masks and windows do not lessen that. Padding, embedding lookup, norms, attention to latents, the
projection of a text's one vector, loss and optimizer are left out.

Peaks are those of the vendors' data sheets, a device, dense, in bfloat16 with float32 sums: Google Cloud's pages on TPU v4
(275 TFLOP/s a chip), v5e (197), v5p (459) and v6e (918), and NVIDIA's data sheets of A100 (312), L4 (121), H100 (SXM 989, NVL
835, PCIe 756) and H200 (989) and its Ada architecture white paper (RTX 4090: 165). Where a sheet tells the rate with sparsity,
half of it is meant.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from jaxembed.model.families import DecoderConfig
from jaxembed.model.lora import ADAPTERS

# JAX's name of a device, as a pattern -> FLOP/s; the first that is found in the name counts.
PEAKS = {
    r"^TPU v4$": 275e12,
    r"^TPU (v5 lite|v5e)$": 197e12,
    r"^TPU (v5|v5p)$": 459e12,
    r"^TPU (v6 lite|v6e)$": 918e12,
    r"\bH200\b": 989e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL4\b": 121e12,
    r"\bRTX 4090$": 165e12,
}


@dataclasses.dataclass(frozen=True)
class MfuMeter:
    """FLOPs of a step by its useful tokens and the pairs of tokens in one text, and the FLOP/s of all devices together."""

    a_token: float
    a_pair: float
    peak: float

    def mfu(self, tokens: int, pairs: int, seconds: float) -> float:
        """The share of the peak that so many tokens and pairs in so many seconds are."""
        return (self.a_token * tokens + self.a_pair * pairs) / (seconds * self.peak)


def make_mfu_meter(decoder: DecoderConfig, trained: Any, frozen: Any, adapters: int, peak: float) -> MfuMeter:
    """That of a model by its parameters; so many `adapters` are stacked in the trained ones, 0 for none."""
    a_token = 6 * numbers(trained, adapters) + 4 * numbers(frozen)
    return MfuMeter(a_token, 12 * decoder.head_width * decoder.heads * decoder.layers, peak)


def numbers(params: Any, adapters: int = 0) -> int:
    """How many numbers there are in the kernels that a token passes, of one adapter where several are stacked."""
    flat = flatten_dict(params)
    names = ("kernel", *ADAPTERS)
    passed = {path: x for path, x in flat.items() if path[0] in ("decoder", "pooling") and path[-1] in names}
    if ("pooling", "latents") in flat:
        del passed["pooling", "attention", "kv", "kernel"]  # the latents pass it, once a step
    return sum(math.prod(x.shape) // (max(adapters, 1) if path[-1] in ADAPTERS else 1) for path, x in passed.items())


def device_peak(dtype: str) -> float | None:
    """FLOP/s of one of the devices here in a computation in `dtype`; None where no data sheet is known."""
    name = jax.devices()[0].device_kind
    found = (peak for pattern, peak in PEAKS.items() if re.search(pattern, name))
    return next(found, None) if dtype == "bfloat16" else None
