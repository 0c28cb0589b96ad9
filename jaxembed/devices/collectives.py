"""Sharding constraints and collectives used inside a compiled step. Without a mesh they do nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from jaxembed.devices.mesh import BATCH_AXES


def replicate(x: jax.Array) -> jax.Array:
    """The array on every device of the mesh that a compiled step runs on (`jax.set_mesh`); as it is without one."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def shard_rows(x: jax.Array) -> jax.Array:
    """The array, split over its first axis as a batch is, and no other; as it is without a mesh (`jax.set_mesh`)."""
    axes = tuple(axis for axis in BATCH_AXES if axis in auto_axes())
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def embedding_lookup(table: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table whose width is split over `fsdp`, [N, D], split over their first axis as a batch is.

    Each device reads its part of the width of its neighbours' rows too; then they exchange these. Left to itself, XLA
    may send all rows to all devices.
    """
    x, free = table[rows].astype(dtype), auto_axes()
    if "fsdp" in free:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("data" if "data" in free else None, "fsdp"))
    return shard_rows(x)


def has_sharded_parameters() -> bool:
    """Whether XLA splits parameters over `fsdp` (`jax.set_mesh`)."""
    return "fsdp" in auto_axes() and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1


def all_gather_fsdp(kernel: jax.Array, axis: int) -> jax.Array:
    """A matrix of which `fsdp` splits an axis, whole along it on every device."""
    if not has_sharded_parameters():
        return kernel
    gather = functools.partial(jax.lax.all_gather, axis_name="fsdp", axis=axis, tiled=True)
    return jax.shard_map(gather, in_specs=_fsdp_spec(axis), out_specs=PartitionSpec(), axis_names={"fsdp"}, check_vma=False)(
        kernel
    )


def reduce_scatter_sum(function: Callable[..., jax.Array], axis: int, *arrays: jax.Array) -> jax.Array:
    """The sum over all shards of what `function` makes of their parts of arrays, a matrix, split over `fsdp` along an axis.

    Each device gets the sum of the part that it keeps.
    """

    def part(*arrays: jax.Array) -> jax.Array:
        made = jax.lax.psum_scatter(function(*arrays), "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(made, "data")

    specs, axes = (PartitionSpec(BATCH_AXES),) * len(arrays), set(BATCH_AXES)
    return jax.shard_map(part, in_specs=specs, out_specs=_fsdp_spec(axis), axis_names=axes, check_vma=False)(*arrays)


def _fsdp_spec(axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, "fsdp")


def auto_axes() -> tuple[str, ...]:
    """Return the mesh axes (`jax.set_mesh`) that XLA may shard over here: none inside `map_over_shards` or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)


def shard_map_size() -> int:
    """How many parts `map_over_shards` splits arrays into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.shape["fsdp"] > 1 else mesh.shape["data"]


def map_over_shards(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function(params, *arrays)` on every shard's own part of arrays that are split over their first axis.

    On a mesh (`jax.set_mesh`) whose shards hold all parameters, their gradients are those of a shard until the function ends,
    and are summed over the shards then, once. Where `fsdp` splits the parameters there is one part, and XLA places everything:
    gradients go to where their parameters are as these come from there, layer by layer. Without a mesh there is one part.
    """
    if shard_map_size() == 1:
        return function

    def mapped(params: Any, *arrays: Any) -> jax.Array:
        specs, split = (PartitionSpec(), *[PartitionSpec("data")] * len(arrays)), PartitionSpec("data")
        # Not checked: kernels for attention do not say over which axes their results vary.
        run = jax.shard_map(function, in_specs=specs, out_specs=split, axis_names={"data"}, check_vma=False)
        return run(params, *arrays)

    return mapped
