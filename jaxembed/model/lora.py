"""Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) dropout(x) A B, where only A and B are trained.

A projection that is a target has them as `lora_a` [in, rank] and `lora_b` [rank, out] beside its kernel, so they are
stacked over the layers as it is. B is zero until trained.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

# PEFT's names of the projections that may have adapters -> ours.
TARGETS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
ADAPTERS = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Sizes and place of the adapters. `deterministic` leaves the dropout out; training switches it off."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(TARGETS)
    deterministic: bool = True

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, projection: str | None) -> bool:
        """Whether a projection, by our name, has adapters."""
        return projection in {TARGETS[target] for target in self.targets}

    def training(self) -> LoRA:
        """With dropout."""
        return dataclasses.replace(self, deterministic=False)


def split(params: Any) -> tuple[Any, Any]:
    """(what is trained, what is frozen): everything and nothing; with adapters, all but the decoder's own parameters."""
    flat = flatten_dict(params)
    if not any(path[-1] in ADAPTERS for path in flat):
        return params, {}
    frozen = {path: x for path, x in flat.items() if path[0] == "decoder" and path[-1] not in ADAPTERS}
    trained = {path: x for path, x in flat.items() if path not in frozen}
    return unflatten_dict(trained), unflatten_dict(frozen)


def join(trained: Any, frozen: Any) -> Any:
    """The whole tree out of what `split` gave."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained)) if frozen else trained


def merge(params: Any, lora: LoRA) -> Any:
    """Parameters of the model without adapters: each one's product is added to its kernel, in float32."""
    flat = flatten_dict(params)
    merged = {path: x for path, x in flat.items() if path[-1] not in ADAPTERS}
    for path, a in flat.items():
        if path[-1] == "lora_a":
            kernel, b = (*path[:-1], "kernel"), flat[*path[:-1], "lora_b"]
            product = jnp.einsum("...ir,...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)
            merged[kernel] = merged[kernel].astype(jnp.float32) + lora.scale * product
    return unflatten_dict(merged)
