"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv:2106.09685): y = x W + (alpha / rank) dropout(x) A B.

Only A and B are trained. An adapted projection stores them as `lora_a` [in, rank] and `lora_b` [rank, out] beside its kernel,
stacked over the layers like the kernel. B is zero before training.

One base may have several named adapters, one of which is used at a time (the task adapters of jina-embeddings-v3, Sturua
et al. 2024, arXiv:2409.10173). Their parameters and optimizer states are then stacked along a first axis, and `pick_adapter`
returns the tree of a model with one of them.

The sizes are the config section `LoraConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxembed.config import LoraConfig
from jaxembed.model.quantization import dequantize

# PEFT's names of the projections that may have adapters, with our names.
TARGET_PROJECTIONS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
ADAPTER_PARAMS = ("lora_a", "lora_b")
ADAPTER_STATE = "adapters"  # key of the optimizer state that each adapter has for itself


def has_adapter(lora: LoraConfig | None, projection: str | None) -> bool:
    """Return whether the projection of this name (ours) has an adapter."""
    return lora is not None and projection in {TARGET_PROJECTIONS[target] for target in lora.targets}


def select_kernel_dtype(lora: LoraConfig | None) -> jnp.dtype:
    """Return the storage dtype of kernels: float32 when they are trained, `base_dtype` when they are frozen."""
    return jnp.dtype("float32" if lora is None else lora.base_dtype)


def select_embedding_dtype(lora: LoraConfig | None) -> jnp.dtype:
    """Return the storage dtype of the token embedding.

    It is bfloat16 beside int8 kernels, the dtype in which most models are released. In int8, a row's rounding error would
    enter the residual stream of all layers. Norms and biases, a few parameters in a thousand, stay in float32.
    """
    dtype = select_kernel_dtype(lora)
    return jnp.dtype(jnp.bfloat16) if dtype == jnp.int8 else dtype


def split_params(params: Any) -> tuple[Any, Any]:
    """Split a tree of parameters into (trained, frozen).

    Without adapters everything is trained. With adapters the decoder's own parameters are frozen.
    """
    flat = flatten_dict(params)
    if not any(path[-1] in ADAPTER_PARAMS for path in flat):
        return params, {}
    frozen = {path: x for path, x in flat.items() if path[0] == "decoder" and path[-1] not in ADAPTER_PARAMS}
    trained = {path: x for path, x in flat.items() if path not in frozen}
    return unflatten_dict(trained), unflatten_dict(frozen)


def join_params(trained: Any, frozen: Any) -> Any:
    """Return the whole tree of the two that `split_params` returned."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained)) if frozen else trained


def merge_adapters(params: Any, lora: LoraConfig) -> Any:
    """Return the float32 parameters of the model without adapters: W + (alpha / rank) A B for every adapted kernel.

    Quantized kernels are dequantized first.
    """
    flat = flatten_dict(params)
    merged = {}
    for path, x in flat.items():
        if path[-1] in (*ADAPTER_PARAMS, "kernel_scale"):
            continue
        scale = flat.get((*path[:-1], f"{path[-1]}_scale"))
        merged[path] = x.astype(jnp.float32) if scale is None else dequantize(x, scale)
        if path[-1] == "kernel" and (*path[:-1], "lora_a") in flat:
            a, b = (flat[*path[:-1], name] for name in ADAPTER_PARAMS)
            merged[path] += lora.scale * jnp.einsum("...ir,...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)
    return unflatten_dict(merged)


def stack_adapters(trees: Sequence[Any]) -> Any:
    """Stack the adapter leaves of trees of one structure along a first axis. Other leaves are those of the first tree."""
    return _map_adapters(lambda *leaves: jnp.stack(leaves), *trees)


def stack_shapes(tree: Any, count: int) -> Any:
    """Return a tree's ShapeDtypeStructs with `count` stacked adapters.

    Args:
        tree: Arrays or ShapeDtypeStructs of one adapter, with shardings. The new first axis is not sharded.
        count: Number of adapters.
    """

    def stack(x: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding)

    return _map_adapters(stack, tree)


def pick_adapter(tree: Any, index: jax.Array | int | None) -> Any:
    """Return the tree with one of its stacked adapters. None returns the tree itself, whose adapters are not stacked."""
    if index is None:
        return tree
    return _map_adapters(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def put_adapter(tree: Any, index: jax.Array | int | None, one: Any) -> Any:
    """Return `one`, the tree of one adapter, with the other adapters of `tree` unchanged beside it.

    Inverse of `pick_adapter`: it replaces the adapter at `index`.
    """
    if index is None:
        return one
    return _map_adapters(lambda new, x: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), one, tree)


def _map_adapters(change: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply `change` to the adapter leaves of a tree and of `others` of the same structure; keep the tree's other leaves."""

    def change_leaf(path: Any, x: Any, *rest: Any) -> Any:
        is_adapter = any(getattr(key, "key", None) in (*ADAPTER_PARAMS, ADAPTER_STATE) for key in path)
        return change(x, *rest) if is_adapter else x

    return jax.tree.map_with_path(change_leaf, tree, *others)
