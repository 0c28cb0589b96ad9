"""The device mesh, and the table from logical parameter axes to mesh axes.

The mesh has three axes. `data` and `fsdp` split a batch over its first axis, shard-major: shard i of n = data x fsdp holds the
i-th n-th of the rows and of the queries. `fsdp` also splits the parameters by model width; `tensor` splits them by heads and by
feed-forward width. Everything else is mathematics on global arrays; XLA places the communication.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
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
    return Mesh(_arrange_devices(shape, chosen), AXES)


def _arrange_devices(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return _prefer_whole_axes(functools.partial(mesh_utils.create_device_mesh, shape, devices))
    if shape[0] % slices:
        raise UserError(f"mesh.data is {shape[0]}, which the {slices} slices of devices do not divide; use a multiple of that")
    within = (shape[0] // slices, *shape[1:])
    return _prefer_whole_axes(functools.partial(mesh_utils.create_hybrid_device_mesh, within, (slices, 1, 1), devices))


def _prefer_whole_axes(arrange: Callable[..., np.ndarray]) -> np.ndarray:
    """The devices, each axis of the mesh along whole axes of the machine if that is possible, else along parts of them."""
    try:
        return arrange()
    except NotImplementedError:
        return arrange(allow_split_physical_axes=True)


def logical_axis_table(mesh: Mesh, sizes: Mapping[str, int]) -> dict[str, str | None]:
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


def target_platform() -> str:
    """What a program is compiled for, such as cpu, gpu or tpu: the mesh's devices (`jax.set_mesh`), else JAX's default."""
    devices = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if devices is None else devices.platform


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


def local_shards(mesh: Mesh) -> Shards:
    """The shards of a batch on a mesh."""
    here = jax.process_index()
    holders = [{device.process_index for device in group.flat} for group in mesh.devices.reshape(shard_count(mesh), -1)]
    own = [shard for shard, processes in enumerate(holders) if here in processes]
    return Shards(len(holders), tuple(own), tuple(shard for shard in own if min(holders[shard]) == here))


def param_shardings(mesh: Mesh, logical_specs: Any, table: Mapping[str, str | None] = LOGICAL_AXES) -> Any:
    """Shardings of parameters from the logical axes they declare; an unmapped name raises KeyError, a clash JAX's own error."""

    def place(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if axis is None else table[axis] for axis in spec)))

    return jax.tree.map(place, logical_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
