"""The device mesh, and the table from logical parameter axes to mesh axes.

The mesh has three axes:

- `data` and `fsdp` split a batch over its first axis, shard-major: shard i of n = data x fsdp holds the i-th n-th of the rows
  and of the queries.
- `fsdp` also splits the parameters by model width.
- `tensor` splits the parameters by heads and by feed-forward width.

All other code is mathematics on global arrays; XLA places the communication.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.devices.cpu import retain_freed_memory
from jaxembed.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Logical axis of a parameter -> mesh axis. One entry for each axis name that the model declares.
LOGICAL_AXES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": "fsdp",
    "channel": None,  # norms and single heads: too small to be worth communicating
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "latents": None,
    "pooling_heads": None,
    "projected": None,
}


_uses_own_devices = ContextVar("uses_own_devices", default=False)


@contextlib.contextmanager
def own_devices_only() -> Iterator[None]:
    """Within the block, build meshes from this process's devices only, for work that other processes do not share."""
    token = _uses_own_devices.set(True)
    try:
        yield
    finally:
        _uses_own_devices.reset(token)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Build a mesh with the given number of devices along each axis.

    Neighbors along `tensor`, then along `fsdp`, are neighbors on the machine. Several slices of a pod lie along `data`.

    Args:
        data: Size of the `data` axis. One of the three sizes may be -1: all remaining devices.
        fsdp: Size of the `fsdp` axis.
        tensor: Size of the `tensor` axis.
        devices: Devices to use. Default: all devices of the run, or this process's (`own_devices_only`).

    Raises:
        UserError: There are too few devices, or the sizes do not divide them.
    """
    if devices is None:
        devices = jax.local_devices() if _uses_own_devices.get() else jax.devices()
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    where = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1 or axis == "data")
    requested_count = math.prod(size for size in sizes.values() if size != -1)
    if requested_count > len(devices):
        remedy = "" if -1 in sizes.values() else ", or -1 for one axis"
        raise UserError(f"{where}: more devices than available ({len(devices)}). Use at most that many{remedy}.")
    if -1 in sizes.values() and len(devices) % requested_count:
        raise UserError(
            f"{where}: {requested_count} does not divide the number of available devices ({len(devices)}). Use a divisor."
        )
    shape = tuple(len(devices) // requested_count if size == -1 else size for size in sizes.values())
    mesh_devices = devices[: math.prod(shape)]
    if idle := {device.process_index for device in devices} - {device.process_index for device in mesh_devices}:
        raise UserError(f"{where}: process {min(idle)} would have no device. Use all {len(devices)} devices.")
    return Mesh(_arrange_devices(shape, mesh_devices), AXES)


def make_fsdp_mesh(fsdp: int) -> Mesh:
    """Return a mesh of all devices, `fsdp` of which share one copy of the model.

    From here on the process keeps freed memory for itself (`retain_freed_memory`).

    Raises:
        UserError: `fsdp` does not divide the number of devices.
    """
    if (count := jax.device_count()) % fsdp:
        raise UserError(f"--fsdp is {fsdp} (expected a divisor of {count}, the number of devices here)")
    retain_freed_memory()
    return make_mesh(fsdp=fsdp)


def _arrange_devices(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Return an array of devices whose neighbors along an axis are neighbors on the machine. Slices lie along `data`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return _prefer_whole_axes(functools.partial(mesh_utils.create_device_mesh, shape, devices))
    if shape[0] % slices:
        raise UserError(f"mesh.data={shape[0]}: not a multiple of the number of device slices ({slices}). Use a multiple.")
    shape_per_slice = (shape[0] // slices, *shape[1:])
    return _prefer_whole_axes(functools.partial(mesh_utils.create_hybrid_device_mesh, shape_per_slice, (slices, 1, 1), devices))


def _prefer_whole_axes(arrange: Callable[..., np.ndarray]) -> np.ndarray:
    """Map each mesh axis to whole physical axes of the machine if possible, otherwise to parts of them."""
    try:
        return arrange()
    except NotImplementedError:
        return arrange(allow_split_physical_axes=True)


def make_logical_axis_table(mesh: Mesh, sizes: Mapping[str, int]) -> dict[str, str | None]:
    """Return the table from logical to mesh axes for a model.

    Key-value heads that `tensor` does not divide are replicated.

    Args:
        mesh: The device mesh.
        sizes: Size of each logical axis of the model.

    Raises:
        UserError: A mesh axis does not divide another logical axis that it splits.
    """
    table = dict(LOGICAL_AXES)
    if sizes["kv_heads"] % mesh.shape["tensor"]:
        table["kv_heads"] = None
    for axis in ("fsdp", "tensor"):
        split_sizes = {name: size for name, size in sizes.items() if table[name] == axis}
        common, count = math.gcd(*split_sizes.values()), mesh.shape[axis]
        if common % count:
            largest = max(n for n in range(1, count) if common % n == 0 == mesh.size % n)
            indivisible = ", ".join(f"{name} ({size})" for name, size in split_sizes.items() if size % count)
            raise UserError(f"mesh.{axis}={count}: does not divide the model's {indivisible}. Use at most {largest}.")
    return table


def get_target_platform() -> str:
    """Return the platform that a program is compiled for: "cpu", "gpu" or "tpu".

    This is the platform of the current mesh (`jax.set_mesh`). Without a mesh, it is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def count_shards(mesh: Mesh) -> int:
    """Return the number of shards that a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of a batch, as seen by one process.

    Several processes build the same shard where `tensor`, or the devices of one shard, span processes.

    Attributes:
        count: Number of shards of the global batch.
        local: Indices of the shards that this process's devices hold, completely or in part.
        counted: Those of `local` that count in totals here. The process with the lowest index among its holders counts a shard.
    """

    count: int
    local: tuple[int, ...]
    counted: tuple[int, ...]


def make_all_shards(count: int) -> Shards:
    """Return the shards of a process that holds all of them."""
    return Shards(count, tuple(range(count)), tuple(range(count)))


def find_local_shards(mesh: Mesh) -> Shards:
    """Return the shards of a batch on a mesh, as seen by this process."""
    this_process = jax.process_index()
    devices_by_shard = mesh.devices.reshape(count_shards(mesh), -1)
    holders = [{device.process_index for device in devices.flat} for devices in devices_by_shard]
    local_shards = [shard for shard, processes in enumerate(holders) if this_process in processes]
    return Shards(
        len(holders), tuple(local_shards), tuple(shard for shard in local_shards if min(holders[shard]) == this_process)
    )


def make_param_shardings(mesh: Mesh, logical_specs: Any, table: Mapping[str, str | None] = LOGICAL_AXES) -> Any:
    """Return the shardings of parameters from the logical axes that they declare.

    Args:
        mesh: The device mesh.
        logical_specs: Tree of `PartitionSpec`s over logical axis names.
        table: Logical axis -> mesh axis.

    Raises:
        KeyError: The table lacks an axis name. Two axes of one parameter on one mesh axis raise JAX's own error.
    """

    def to_sharding(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if axis is None else table[axis] for axis in spec)))

    return jax.tree.map(to_sharding, logical_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
