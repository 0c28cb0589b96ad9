"""Attention kernels on a mesh: XLA cannot split such a kernel over devices by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from jaxembed.config.field_lists import log_once
from jaxembed.devices.collectives import get_auto_axes
from jaxembed.devices.mesh import BATCH_AXES


def shard_kernel(name: str, function: Callable[..., jax.Array], rows: int, kv_heads: int) -> Callable[..., jax.Array]:
    """Return `function(q, k, v, segment)` wrapped in `shard_map`, so that each device runs it on its own rows and heads.

    Rows are split over the batch axes and heads over the axis `tensor`. If an axis does not divide them evenly, every device
    computes all of them. Mesh axes that an outer `shard_map` has already split are not used.

    Args:
        name: Name of the kernel, for the log.
        function: The kernel. It maps [R, T, N, H], twice [R, T, G, H] and [R, T] to [R, T, N, H].
        rows: Number of rows R.
        kv_heads: Number of key-value heads G.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), get_auto_axes()
    if not axes:
        return function
    row_axes = tuple(axis for axis in BATCH_AXES if axis in axes)
    if rows % (row_shards := math.prod(mesh.shape[axis] for axis in row_axes)):
        log_once(f"attention kernel {name}: {rows} rows do not divide among {row_shards} shards, so every device computes all")
        row_axes = ()
    head_axis = "tensor" if "tensor" in axes and kv_heads % mesh.shape["tensor"] == 0 else None
    if "tensor" in axes and head_axis is None:
        log_once(
            f"attention kernel {name}: {kv_heads} key-value heads do not divide among the {mesh.shape['tensor']} devices of "
            "the axis tensor, so every device computes all"
        )
    spec = PartitionSpec(row_axes, None, head_axis)
    specs = (spec, spec, spec, PartitionSpec(row_axes))
    # The libraries' kernels do not declare over which axes their results vary, so `check_vma` cannot hold.
    return jax.shard_map(function, in_specs=specs, out_specs=spec, axis_names=set(axes), check_vma=False)
