"""Sharding constraints and collectives inside a compiled step.

They apply to the mesh that the step runs on (`jax.set_mesh`). Without a mesh they do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from jaxembed.devices.mesh import BATCH_AXES


def replicate(x: jax.Array) -> jax.Array:
    """Constrain an array to be replicated on every device of the mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def shard_rows(x: jax.Array) -> jax.Array:
    """Constrain an array to be split over its first axis as a batch is, and over no other axis."""
    axes = tuple(axis for axis in BATCH_AXES if axis in get_auto_axes())
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def embedding_lookup(table: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """Look up rows of a table whose width is split over `fsdp`.

    Each device first reads its part of the width, for its neighbors' rows too; then the devices exchange these parts. Without
    this constraint, XLA may send all rows to all devices.

    Args:
        table: [V, D].
        rows: Indices into the table [N].
        dtype: Data type of the result.

    Returns:
        [N, D], split over the first axis as a batch is.
    """
    x, axes = table[rows].astype(dtype), get_auto_axes()
    if "fsdp" in axes:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("data" if "data" in axes else None, "fsdp"))
    return shard_rows(x)


def has_sharded_parameters() -> bool:
    """Return whether XLA splits parameters over `fsdp`."""
    return "fsdp" in get_auto_axes() and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1


def all_gather_fsdp(kernel: jax.Array, axis: int) -> jax.Array:
    """All-gather a matrix along the axis that `fsdp` splits, so that every device holds all of it."""
    if not has_sharded_parameters():
        return kernel
    gather = jax.shard_map(
        functools.partial(jax.lax.all_gather, axis_name="fsdp", axis=axis, tiled=True),
        in_specs=_make_fsdp_spec(axis), out_specs=PartitionSpec(), axis_names={"fsdp"}, check_vma=False,
    )  # fmt: skip
    return gather(kernel)


def reduce_scatter_sum(function: Callable[..., jax.Array], axis: int, *arrays: jax.Array) -> jax.Array:
    """Sum a function of each shard's rows over all shards, and scatter the sum over `fsdp`.

    Each device receives the sum of the part that it holds.

    Args:
        function: Maps one shard's rows of `arrays` to a matrix.
        axis: Axis of that matrix that `fsdp` splits.
        *arrays: Arrays split over their first axis as a batch is.
    """

    def reduce_scatter(*local_arrays: jax.Array) -> jax.Array:
        part = jax.lax.psum_scatter(function(*local_arrays), "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(part, "data")

    specs, axes = (PartitionSpec(BATCH_AXES),) * len(arrays), set(BATCH_AXES)
    mapped = jax.shard_map(reduce_scatter, in_specs=specs, out_specs=_make_fsdp_spec(axis), axis_names=axes, check_vma=False)
    return mapped(*arrays)


def _make_fsdp_spec(axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, "fsdp")


def get_auto_axes() -> tuple[str, ...]:
    """Return the mesh axes that XLA may shard over here: none inside `map_over_shards` or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)


def count_map_shards() -> int:
    """Return the number of parts that `map_over_shards` splits arrays into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.shape["fsdp"] > 1 else mesh.shape["data"]


def map_over_shards(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Map `function(params, *arrays)` over the shards of `arrays`, which are split over their first axis.

    - If each shard holds all parameters, gradients stay local to a shard until the function ends. They are summed over the
      shards once, at the end.
    - If `fsdp` splits the parameters there is a single part, and XLA places everything: each layer's gradients are reduced
      to the devices that its parameters were gathered from.
    - Without a mesh there is a single part.
    """
    if count_map_shards() == 1:
        return function

    def mapped(params: Any, *arrays: Any) -> jax.Array:
        in_specs, out_specs = (PartitionSpec(), *[PartitionSpec("data")] * len(arrays)), PartitionSpec("data")
        # Unchecked: attention kernels do not declare the axes over which their results vary.
        run = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={"data"}, check_vma=False)
        return run(params, *arrays)

    return mapped
