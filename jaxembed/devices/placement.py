"""Move host arrays onto the mesh and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.devices.mesh import BATCH_AXES, find_local_shards

ALIGNMENT_BYTES = 64  # the CPU backend aliases host memory that starts on such a boundary, instead of copying it


def make_replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def make_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batch arrays: the first axis over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Build the global arrays of a batch from the host arrays of each process.

    Args:
        mesh: The device mesh.
        tree: Host arrays, the process's own shards concatenated along the first axis. Scalars must be the same on all
            processes.

    Returns:
        Global arrays split over their first axis. Scalars are replicated.
    """
    shards = find_local_shards(mesh)

    def put(x: Any) -> jax.Array:
        if not np.ndim(x):
            return put_global(_choose_leaf_sharding(mesh, x), x)
        rows_per_shard = len(x) // len(shards.local)

        def read_shard(index: Any) -> np.ndarray:
            start = shards.local.index((index[0].start or 0) // rows_per_shard) * rows_per_shard
            return np.asarray(x[start : start + rows_per_shard])

        global_shape = (rows_per_shard * shards.count, *x.shape[1:])
        return jax.make_array_from_callback(global_shape, _choose_leaf_sharding(mesh, x), read_shard)

    return jax.tree.map(put, tree)


def compute_batch_shapes(mesh: Mesh, tree: Any) -> Any:
    """Return the shapes, with shardings, that `put_batch` gives for a single process's host arrays or their shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_choose_leaf_sharding(mesh, x)), tree)


def _choose_leaf_sharding(mesh: Mesh, x: Any) -> NamedSharding:
    return make_batch_sharding(mesh) if np.ndim(x) else make_replicated_sharding(mesh)


def put_global(sharding: NamedSharding, tree: Any) -> Any:
    """Build global arrays from host arrays of which every process holds a complete copy."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i]), tree)


def replicated_jit(mesh: Mesh, make: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Run `make` on global arrays (or on none) under jit, with replicated outputs."""
    return jax.jit(make, out_shardings=make_replicated_sharding(mesh))(*arrays)


def put_local_parts(
    sharding: NamedSharding, shape: tuple[int, ...], make_part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Build a global array from the parts that this process's devices hold.

    On CPUs the array aliases the memory of parts that start on a 64-byte boundary (`allocate_aligned`).

    Args:
        sharding: Sharding of the global array.
        shape: Shape of the global array.
        make_part: Returns the part of the global array at an index (one slice per axis). It is called once per distinct part.
    """
    indices = sharding.addressable_devices_indices_map(shape)
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    arrays = []
    for device, index in indices.items():
        bounds = tuple(axis_slice.indices(size)[:2] for axis_slice, size in zip(index or (), shape, strict=True))
        if bounds not in parts:
            parts[bounds] = make_part(tuple(slice(*ends) for ends in bounds))
        arrays.append(jax.device_put(parts[bounds], device, may_alias=True))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def allocate_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialized array on a 64-byte boundary, which the CPU backend aliases instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    offset = -buffer.ctypes.data % ALIGNMENT_BYTES
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def unstack_views(mesh: Mesh, x: jax.Array) -> list[jax.Array]:
    """Return the entries of an array's first axis as separate arrays.

    On one CPU, entries that start on a 64-byte boundary are views of the array's own memory. While such a view is alive,
    donating the array to a program copies it.
    """
    return [jax.device_put(entry, make_replicated_sharding(mesh), may_alias=True) for entry in np.asarray(x)]


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Return an array's values on every process.

    All processes must call it together if the array is split over several.
    """
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        assert isinstance(x.sharding, NamedSharding)
        x = _compile_all_gather(x.sharding.mesh)(x)
    return np.asarray(x)


@functools.cache
def _compile_all_gather(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda x: x, out_shardings=make_replicated_sharding(mesh))
