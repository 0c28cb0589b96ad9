"""Moving host arrays onto the mesh and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.devices.mesh import BATCH_AXES, local_shards


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batch arrays: first axis over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Host arrays that hold a process's own shards one after the other as global ones, split over the first axis.

    Numbers, the same on all processes, are on every device.
    """
    shards = local_shards(mesh)

    def put(x: Any) -> jax.Array:
        if not np.ndim(x):
            return put_global(_leaf_sharding(mesh, x), x)
        size = len(x) // len(shards.own)

        def part(index: Any) -> np.ndarray:
            first = shards.own.index((index[0].start or 0) // size) * size
            return np.asarray(x[first : first + size])

        return jax.make_array_from_callback((size * shards.count, *x.shape[1:]), _leaf_sharding(mesh, x), part)

    return jax.tree.map(put, tree)


def batch_shapes(mesh: Mesh, tree: Any) -> Any:
    """The shapes that `put_batch` would make of one process's host arrays, or of their shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_leaf_sharding(mesh, x)), tree)


def _leaf_sharding(mesh: Mesh, x: Any) -> NamedSharding:
    return batch_sharding(mesh) if np.ndim(x) else replicated_sharding(mesh)


def put_global(sharding: NamedSharding, tree: Any) -> Any:
    """Host arrays that every process has whole as global ones."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i]), tree)


def replicated_jit(mesh: Mesh, make: Callable[..., Any], *arrays: jax.Array) -> Any:
    """What a function makes of global arrays, or of nothing, computed on every device."""
    return jax.jit(make, out_shardings=replicated_sharding(mesh))(*arrays)


def put_local_parts(
    sharding: NamedSharding, shape: tuple[int, ...], part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """A global array of those parts that this process's devices hold, each made once, where it lies in the whole.

    On CPUs the array takes over the memory of parts that lie on a 64-byte boundary.
    """
    indices = sharding.addressable_devices_indices_map(shape)
    made: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    arrays = []
    for device, index in indices.items():
        where = tuple(of_axis.indices(size)[:2] for of_axis, size in zip(index or (), shape, strict=True))
        if where not in made:
            made[where] = part(tuple(slice(*ends) for ends in where))
        arrays.append(jax.device_put(made[where], device, may_alias=True))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array on a 64-byte boundary, which the CPU backend takes without another copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size].view(dtype).reshape(shape)


def unstack_views(mesh: Mesh, x: jax.Array) -> list[jax.Array]:
    """The entries of an array's first axis. On one CPU they are the array's own memory where they lie on a 64-byte boundary; as
    long as one is there, a program that the array is given away to works on a copy.
    """
    return [jax.device_put(entry, replicated_sharding(mesh), may_alias=True) for entry in np.asarray(x)]


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The values of an array on every process; where it is split over several, all of them must ask."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        assert isinstance(x.sharding, NamedSharding)
        x = _gather_program(x.sharding.mesh)(x)
    return np.asarray(x)


@functools.cache
def _gather_program(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda x: x, out_shardings=replicated_sharding(mesh))
