"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv:2106.09685): y = x W + (alpha / rank) dropout(x) A B.

Only A and B are trained. An adapted projection stores them as `lora_a` [in, rank] and `lora_b` [rank, out] beside its kernel,
stacked over the layers like the kernel. B is zero before training.

One base may have several named adapters, of which one is used at a time (the task adapters of jina-embeddings-v3, Sturua
et al. 2024, arXiv:2409.10173). Their parameters and optimizer states are then stacked along a first axis, and `pick_adapter`
returns the tree of a model with one of them.

The sizes are the config section `LoraConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxembed.config import LoraConfig
from jaxembed.errors import UserError
from jaxembed.model.families import TransformerConfig
from jaxembed.model.quantization import dequantize

# Projections that may have adapters: their names in PEFT, and in our parameter tree.
TARGET_PROJECTIONS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
ADAPTER_PARAMS = ("lora_a", "lora_b")
FROZEN_PARTS = ("decoder", "head")  # parts of a model that come from the base and are frozen under adapters
EMBEDDING_PATH = ("decoder", "embedding")  # of the token embedding
FREEZABLE_PATHS = {"embedding": EMBEDDING_PATH}  # parameters that can be frozen without adapters, by name
ADAPTER_STATE = "adapters"  # key of the optimizer state that is separate for each adapter


def has_adapter(lora: LoraConfig | None, projection: str | None) -> bool:
    """Return whether a projection has an adapter, given its name in our parameter tree."""
    return lora is not None and projection in {TARGET_PROJECTIONS[target] for target in lora.targets}


def check_targets_exist(lora: LoraConfig | None, transformer: TransformerConfig) -> None:
    """Check that a transformer has projections for adapters. Targets that it lacks are left out, such as the gate of BERT.

    Raises:
        UserError: The transformer has none of the targets.
    """
    if lora is not None and not transformer.gated_mlp and set(lora.targets) == {"gate_proj"}:
        raise UserError(
            f"model.lora.targets: {transformer.family} has no gate_proj (expected some of "
            f"{', '.join(target for target in TARGET_PROJECTIONS if target != 'gate_proj')}). Choose others."
        )


def select_kernel_dtype(lora: LoraConfig | None) -> jnp.dtype:
    """Return the storage dtype of kernels: float32 when they are trained, `base_dtype` when they are frozen."""
    return jnp.dtype("float32" if lora is None else lora.base_dtype)


def select_embedding_dtype(lora: LoraConfig | None) -> jnp.dtype:
    """Return the storage dtype of the token embedding.

    It has the dtype of the kernels, except that with int8 kernels it is bfloat16, the dtype in which most models are released.
    In int8, the rounding error of a row would enter the residual stream of all layers. Norms and biases, a few parameters in a
    thousand, are always in float32.
    """
    dtype = select_kernel_dtype(lora)
    return jnp.dtype(jnp.bfloat16) if dtype == jnp.int8 else dtype


def has_adapter_params(params: Any) -> bool:
    """Return whether a tree of parameters contains adapters."""
    return any(path[-1] in ADAPTER_PARAMS for path in flatten_dict(params))


def split_params(params: Any, frozen_names: Sequence[str] = ()) -> tuple[Any, Any]:
    """Split a tree of parameters into (trained, frozen).

    With adapters the transformer and the language-model head are frozen. Without adapters everything is trained, except for
    the parameters that are named.

    Args:
        params: The parameters.
        frozen_names: Names of FREEZABLE_PATHS. Adapters freeze these parameters in any case.
    """
    flat = flatten_dict(params)
    if has_adapter_params(params):
        frozen = {path: x for path, x in flat.items() if path[0] in FROZEN_PARTS and path[-1] not in ADAPTER_PARAMS}
    elif frozen_names:
        frozen = {path: flat[path] for path in map(FREEZABLE_PATHS.__getitem__, frozen_names)}
    else:
        return params, {}
    trained = {path: x for path, x in flat.items() if path not in frozen}
    return unflatten_dict(trained), unflatten_dict(frozen)


def join_params(trained: Any, frozen: Any) -> Any:
    """Join the two trees that `split_params` returned."""
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


def zero_adapters(params: Any) -> Any:
    """Return parameters whose adapters change nothing, so that the model is its base. No parameter has a gradient."""
    flat = flatten_dict(jax.lax.stop_gradient(params))
    return unflatten_dict({path: jnp.zeros_like(x) if path[-1] == "lora_b" else x for path, x in flat.items()})


def concatenate_adapters(lora: LoraConfig, trees: Sequence[Any]) -> tuple[LoraConfig, Any]:
    """Return adapters whose update is the sum of several ones': A1 B1 + A2 B2 = [A1 A2] [B1; B2].

    Args:
        lora: Sizes of each.
        trees: Their parameters. Others are left out.

    Returns:
        The sizes and the parameters.
    """
    flats = [{path: x for path, x in flatten_dict(tree).items() if path[-1] in ADAPTER_PARAMS} for tree in trees]
    axes = dict(zip(ADAPTER_PARAMS, (-1, -2), strict=True))
    joined = {path: np.concatenate([flat[path] for flat in flats], axis=axes[path[-1]]) for path in flats[0]}
    count = len(trees)
    return lora.replace(rank=count * lora.rank, alpha=count * lora.alpha), unflatten_dict(joined)


def stack_adapters(trees: Sequence[Any]) -> Any:
    """Stack the adapter leaves of trees of the same structure along a first axis. Take other leaves from the first tree."""
    return _map_adapters(lambda *leaves: jnp.stack(leaves), *trees)


def stack_shapes(tree: Any, count: int) -> Any:
    """Return the ShapeDtypeStructs of a tree with `count` stacked adapters, from a tree with one.

    Args:
        tree: Arrays or ShapeDtypeStructs of one adapter, with shardings. The new first axis is not sharded.
        count: Number of adapters.
    """

    def stack(x: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding)

    return _map_adapters(stack, tree)


def pick_adapter(tree: Any, index: jax.Array | int | None) -> Any:
    """Return the tree of one of the stacked adapters. An index of None means that nothing is stacked: return `tree`."""
    if index is None:
        return tree
    return _map_adapters(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def put_adapter(tree: Any, index: jax.Array | int | None, adapter_tree: Any) -> Any:
    """Return `tree` with the adapter at `index` replaced: the inverse of `pick_adapter`.

    Args:
        tree: Tree with stacked adapters.
        index: Index of the adapter to replace. None means that nothing is stacked: return `adapter_tree`.
        adapter_tree: Tree of the new adapter. Leaves that are not adapters come from this tree too.
    """
    if index is None:
        return adapter_tree
    return _map_adapters(lambda new, x: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), adapter_tree, tree)


def _map_adapters(change: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Map `change` over the adapter leaves of trees of the same structure. Take other leaves from the first tree."""

    def change_leaf(path: Any, x: Any, *rest: Any) -> Any:
        is_adapter = any(getattr(key, "key", None) in (*ADAPTER_PARAMS, ADAPTER_STATE) for key in path)
        return change(x, *rest) if is_adapter else x

    return jax.tree.map_with_path(change_leaf, tree, *others)
