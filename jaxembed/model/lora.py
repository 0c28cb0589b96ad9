"""Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) dropout(x) A B, where only A and B are trained.

A projection that is a target has them as `lora_a` [in, rank] and `lora_b` [rank, out] beside its kernel, so they are
stacked over the layers as it is. B is zero until trained.

One base may have several adapters by name, one of which is used at a time (the task adapters of jina-embeddings-v3, Sturua
et al. 2024). Their parameters, and what the optimizer keeps of them, are then stacked on a first axis; `pick_adapter` gives
the tree of a model that has the one alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxembed.model.quantization import dequantize

# PEFT's names of the projections that may have adapters -> ours.
TARGETS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
ADAPTERS = ("lora_a", "lora_b")
OWN = "adapters"  # of the optimizer's state: what it counts for each adapter by itself


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Sizes and place of the adapters. `deterministic` leaves the dropout out; training switches it off.

    The matrices of the frozen base are held in `base_dtype`: float32, bfloat16 or int8. `names` are those of several adapters.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(TARGETS)
    base_dtype: str = "float32"
    names: tuple[str, ...] = ()
    deterministic: bool = True

    @property
    def embedding_dtype(self) -> Any:
        """Of the frozen embedding: with int8 kernels it is in bfloat16, as most models are released, since a row's rounding
        error would stand in the sum of all layers; norms and biases, a few in a thousand numbers, stay in float32.
        """
        return jnp.dtype("bfloat16" if self.base_dtype == "int8" else self.base_dtype)

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
    """Parameters, in float32, of the model without adapters: each one's product is added to its dequantised kernel."""
    flat = flatten_dict(params)
    merged = {}
    for path, x in flat.items():
        if path[-1] in (*ADAPTERS, "kernel_scale"):
            continue
        scale = flat.get((*path[:-1], f"{path[-1]}_scale"))
        merged[path] = x.astype(jnp.float32) if scale is None else dequantize(x, scale)
        if path[-1] == "kernel" and (*path[:-1], "lora_a") in flat:
            a, b = (flat[*path[:-1], name] for name in ADAPTERS)
            merged[path] += lora.scale * jnp.einsum("...ir,...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)
    return unflatten_dict(merged)


def stack_adapters(trees: Sequence[Any]) -> Any:
    """The adapters' leaves of trees of one structure, stacked on a first axis; everything else is that of the first tree."""
    return _with_adapters(lambda *leaves: jnp.stack(leaves), *trees)


def stacked_shapes(tree: Any, count: int) -> Any:
    """What a tree of arrays (or ShapeDtypeStructs) with shardings is like with so many adapters; that axis is not split."""

    def stacked(x: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding)

    return _with_adapters(stacked, tree)


def pick_adapter(tree: Any, index: jax.Array | int | None) -> Any:
    """The tree with one adapter of the stacked ones; the tree as it is for None, where they are not stacked."""
    if index is None:
        return tree
    return _with_adapters(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def put_adapter(tree: Any, index: jax.Array | int | None, one: Any) -> Any:
    """`one`, the tree of an adapter, with the other adapters of `tree` beside it, exactly as they were."""
    if index is None:
        return one
    return _with_adapters(lambda new, x: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), one, tree)


def _with_adapters(change: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The tree with its adapters' leaves changed; `others` are of the same structure."""

    def leaf(path: Any, x: Any, *rest: Any) -> Any:
        own = any(getattr(key, "key", None) in (*ADAPTERS, OWN) for key in path)
        return change(x, *rest) if own else x

    return jax.tree.map_with_path(leaf, tree, *others)
