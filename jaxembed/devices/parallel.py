"""Devices: the mesh, the table from logical to mesh axes, and the way of host arrays onto the mesh.

The mesh has three axes. `data` and `fsdp` split a batch over its first axis, shard-major: shard i of n = data x fsdp holds the
i-th n-th of the rows and of the queries. `fsdp` also splits the parameters by the model's width, `tensor` by heads and by the
feed-forward's width. Everything after that is plain mathematics on global arrays; XLA places the communication.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxembed.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Logical axis of a parameter -> mesh axis. One entry per axis name that the model declares.
LOGICAL_AXES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": "fsdp",
    "channel": None,  # of norms and of single heads: too little to be worth a message
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "latents": None,
    "pooling_heads": None,
    "projected": None,
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of so many devices along each axis, of which one may be -1: the rest of them.

    Neighbours in `tensor`, then in `fsdp`, are neighbours on the machine; several slices of a pod lie along `data`. Raises
    `UserError` where there are too few devices, or they do not come out even.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    told = ", ".join(f"mesh.{axis} is {size}" for axis, size in sizes.items() if size != 1 or axis == "data")
    named = math.prod(size for size in sizes.values() if size != -1)
    if named > len(devices):
        raise UserError(f"{told}, but {len(devices)} devices are here; use at most that, or -1 for all")
    if -1 in sizes.values() and len(devices) % named:
        raise UserError(f"{told}: {named} does not divide the {len(devices)} devices that are here; use a divisor of that")
    shape = tuple(len(devices) // named if size == -1 else size for size in sizes.values())
    chosen = devices[: math.prod(shape)]
    if idle := {device.process_index for device in devices} - {device.process_index for device in chosen}:
        raise UserError(f"{told}, which leaves process {min(idle)} without a device; use all {len(devices)}")
    return Mesh(_arranged(shape, chosen), AXES)


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return _along_wires(functools.partial(mesh_utils.create_device_mesh, shape, devices))
    if shape[0] % slices:
        raise UserError(f"mesh.data is {shape[0]}, which the {slices} slices of devices do not divide; use a multiple of that")
    within = (shape[0] // slices, *shape[1:])
    return _along_wires(functools.partial(mesh_utils.create_hybrid_device_mesh, within, (slices, 1, 1), devices))


def _along_wires(arrange: Callable[..., np.ndarray]) -> np.ndarray:
    """The devices, each axis of the mesh along whole axes of the machine if that is possible, else along parts of them."""
    try:
        return arrange()
    except NotImplementedError:
        return arrange(allow_split_physical_axes=True)


def axis_table(mesh: Mesh, sizes: Mapping[str, int]) -> dict[str, str | None]:
    """The table for a model with `sizes` of logical axes: key-value heads that `tensor` does not divide are on every device.

    Any other axis that does not come out even raises `UserError`.
    """
    table = dict(LOGICAL_AXES)
    if sizes["kv_heads"] % mesh.shape["tensor"]:
        table["kv_heads"] = None
    for axis in ("fsdp", "tensor"):
        split = {name: size for name, size in sizes.items() if table[name] == axis}
        common, count = math.gcd(*split.values()), mesh.shape[axis]
        if common % count:
            fits = max(n for n in range(1, count) if common % n == 0)
            told = ", ".join(f"{name} ({size})" for name, size in split.items() if size % count)
            raise UserError(
                f"mesh: {axis} is {count}, which does not divide the model's {told}; the largest that fits is {fits}"
            )
    return table


def platform() -> str:
    """What a program is compiled for, such as cpu, gpu or tpu: the mesh's devices (`jax.set_mesh`), else JAX's default."""
    devices = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if devices is None else devices.platform


def compiler_options() -> dict[str, str]:
    """Options for compiling a model's program (`jax.jit`'s compiler_options).

    On CPUs, XLA's memory-minded order of operations: less memory, and products that do not run two at once, a core each.
    And vectors as wide as the widest registers there are, where XLA's default is half of AVX-512's.
    """
    if platform() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_cpu_prefer_vector_width": "512"}


def keep_memory() -> None:
    """On CPUs under glibc, large buffers that the main thread gives back are kept for the next: pages fetched anew from the
    system, and zeroed, for every step took a seventh of its time.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Gives back what `keep_memory` kept: before another program is compiled, whose small buffers would break up large ones."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of a process that computes on CPUs, if it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" and jax.default_backend() == "cpu" else None
    return libc if hasattr(libc, "mallopt") else None


def shard_count(mesh: Mesh) -> int:
    """Number of shards a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of a batch: how many, those of which this process's devices hold parts, and those of these that no process
    before it holds (where `tensor` or a shard's devices span processes, several build the same shard).
    """

    count: int
    own: tuple[int, ...]
    counted: tuple[int, ...]


def all_shards(count: int) -> Shards:
    """Those of a process that holds them all."""
    return Shards(count, tuple(range(count)), tuple(range(count)))


def shards_of(mesh: Mesh) -> Shards:
    """The shards of a batch on a mesh."""
    here = jax.process_index()
    holders = [{device.process_index for device in group.flat} for group in mesh.devices.reshape(shard_count(mesh), -1)]
    own = [shard for shard, processes in enumerate(holders) if here in processes]
    return Shards(len(holders), tuple(own), tuple(shard for shard in own if min(holders[shard]) == here))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of batch arrays: first axis over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Host arrays that hold a process's own shards one after the other as global ones, split over the first axis.

    Numbers, the same on all processes, are on every device.
    """
    shards = shards_of(mesh)

    def put(x: Any) -> jax.Array:
        if not np.ndim(x):
            return put_whole(_of_batch(mesh, x), x)
        size = len(x) // len(shards.own)

        def part(index: Any) -> np.ndarray:
            first = shards.own.index((index[0].start or 0) // size) * size
            return np.asarray(x[first : first + size])

        return jax.make_array_from_callback((size * shards.count, *x.shape[1:]), _of_batch(mesh, x), part)

    return jax.tree.map(put, tree)


def batch_shapes(mesh: Mesh, tree: Any) -> Any:
    """The shapes that `put_batch` would make of one process's host arrays, or of their shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_of_batch(mesh, x)), tree)


def _of_batch(mesh: Mesh, x: Any) -> NamedSharding:
    return split_batch(mesh) if np.ndim(x) else replicated(mesh)


def put_whole(sharding: NamedSharding, tree: Any) -> Any:
    """Host arrays that every process has whole as global ones."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i]), tree)


def made(mesh: Mesh, make: Callable[..., Any], *arrays: jax.Array) -> Any:
    """What a function makes of global arrays, or of nothing, computed on every device."""
    return jax.jit(make, out_shardings=replicated(mesh))(*arrays)


def put_parts(sharding: NamedSharding, shape: tuple[int, ...], part: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
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


def views(mesh: Mesh, x: jax.Array) -> list[jax.Array]:
    """The entries of an array's first axis. On one CPU they are the array's own memory where they lie on a 64-byte boundary; as
    long as one is there, a program that the array is given away to works on a copy.
    """
    return [jax.device_put(entry, replicated(mesh), may_alias=True) for entry in np.asarray(x)]


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The values of an array on every process; where it is split over several, all of them must ask."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        assert isinstance(x.sharding, NamedSharding)
        x = _gather(x.sharding.mesh)(x)
    return np.asarray(x)


@functools.cache
def _gather(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def param_shardings(mesh: Mesh, logical_specs: Any, table: Mapping[str, str | None] = LOGICAL_AXES) -> Any:
    """Shardings of parameters from the logical axes they declare; an unmapped name raises KeyError, a clash JAX's own error."""

    def place(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if axis is None else table[axis] for axis in spec)))

    return jax.tree.map(place, logical_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def everywhere(x: jax.Array) -> jax.Array:
    """The array on every device of the mesh that a compiled step runs on (`jax.set_mesh`); as it is without one."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def split_rows(x: jax.Array) -> jax.Array:
    """The array, split over its first axis as a batch is, and no other; as it is without a mesh (`jax.set_mesh`)."""
    axes = tuple(axis for axis in BATCH_AXES if axis in free_axes())
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def looked_up(table: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table whose width is split over `fsdp`, [N, D], split over their first axis as a batch is.

    Each device reads its part of the width of its neighbours' rows too; then they exchange these. Left to itself, XLA
    may send all rows to all devices.
    """
    x, free = table[rows].astype(dtype), free_axes()
    if "fsdp" in free:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("data" if "data" in free else None, "fsdp"))
    return split_rows(x)


def splits_parameters() -> bool:
    """Whether XLA splits parameters over `fsdp` (`jax.set_mesh`)."""
    return "fsdp" in free_axes() and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1


def fetched(kernel: jax.Array, axis: int) -> jax.Array:
    """A matrix of which `fsdp` splits an axis, whole along it on every device."""
    if not splits_parameters():
        return kernel
    gather = functools.partial(jax.lax.all_gather, axis_name="fsdp", axis=axis, tiled=True)
    return jax.shard_map(gather, in_specs=_along(axis), out_specs=PartitionSpec(), axis_names={"fsdp"}, check_vma=False)(kernel)


def summed_parts(function: Callable[..., jax.Array], axis: int, *arrays: jax.Array) -> jax.Array:
    """The sum over all shards of what `function` makes of their parts of arrays, a matrix, split over `fsdp` along an axis.

    Each device gets the sum of the part that it keeps.
    """

    def part(*arrays: jax.Array) -> jax.Array:
        made = jax.lax.psum_scatter(function(*arrays), "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(made, "data")

    specs, axes = (PartitionSpec(BATCH_AXES),) * len(arrays), set(BATCH_AXES)
    return jax.shard_map(part, in_specs=specs, out_specs=_along(axis), axis_names=axes, check_vma=False)(*arrays)


def _along(axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, "fsdp")


def free_axes() -> tuple[str, ...]:
    """The axes of the mesh (`jax.set_mesh`) over which XLA splits arrays, no `by_shard` being around; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)


def parts_by_shard() -> int:
    """How many parts `by_shard` splits arrays into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.shape["fsdp"] > 1 else mesh.shape["data"]


def by_shard(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function(params, *arrays)` on every shard's own part of arrays that are split over their first axis.

    On a mesh (`jax.set_mesh`) whose shards hold all parameters, their gradients are those of a shard until the function ends,
    and are summed over the shards then, once. Where `fsdp` splits the parameters there is one part, and XLA places everything:
    gradients go to where their parameters are as these come from there, layer by layer. Without a mesh there is one part.
    """
    if parts_by_shard() == 1:
        return function

    def mapped(params: Any, *arrays: Any) -> jax.Array:
        specs, split = (PartitionSpec(), *[PartitionSpec("data")] * len(arrays)), PartitionSpec("data")
        # Not checked: kernels for attention do not say over which axes their results vary.
        run = jax.shard_map(function, in_specs=specs, out_specs=split, axis_names={"data"}, check_vma=False)
        return run(params, *arrays)

    return mapped
