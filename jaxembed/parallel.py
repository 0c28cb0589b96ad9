"""Devices: the mesh, the table from logical to mesh axes, and the way of host arrays onto the mesh.

Arrays that belong to a batch are split over their first axis, shard-major: shard i of n holds the i-th n-th of the
rows and of the queries. Everything after that is plain mathematics on global arrays; XLA places the communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.errors import UserError

# Logical axis of a parameter -> mesh axis. One entry per axis name that the model declares.
LOGICAL_AXES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "head_width": None,
    "mlp": None,
    "latents": None,
    "projected": None,
}
BATCH_AXES = ("data",)


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices (-1: all) with the axis `data`. Raises `UserError` where there are fewer."""
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if count > len(devices):
        raise UserError(f"mesh.data is {data}, but {len(devices)} devices are here; use at most that, or -1 for all")
    return Mesh(np.array(devices[:count]), BATCH_AXES)


def platform() -> str:
    """What a program is compiled for, such as cpu, gpu or tpu: the mesh's devices (`jax.set_mesh`), else JAX's default."""
    devices = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if devices is None else devices.platform


def compiler_options() -> dict[str, str]:
    """Options for compiling a model's program (`jax.jit`'s compiler_options).

    On CPUs, XLA's memory-minded order of operations: less memory, and products that do not run two at once, a core each.
    """
    cpu = platform() == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if cpu else {}


def shard_count(mesh: Mesh) -> int:
    """Number of shards a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of batch arrays: first axis over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """This process's part of host arrays as global arrays, split over the first axis; numbers are on every device."""

    def put(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(split_batch(mesh) if np.ndim(x) else replicated(mesh), x)

    return jax.tree.map(put, tree)


def param_shardings(mesh: Mesh, logical_specs: Any) -> Any:
    """Shardings of parameters from the logical axes they declare; an unmapped name raises KeyError."""

    def place(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in spec)))

    return jax.tree.map(place, logical_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def everywhere(x: jax.Array) -> jax.Array:
    """The array on every device of the mesh that a compiled step runs on (`jax.set_mesh`); as it is without one."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def by_shard(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function(params, *arrays)` on every shard's own part of arrays that are split over their first axis.

    On a mesh (`jax.set_mesh`) the gradients of `params` are those of a shard until the function ends. Without one there is
    one shard.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function

    def mapped(params: Any, *arrays: Any) -> jax.Array:
        specs = (PartitionSpec(), *[PartitionSpec(BATCH_AXES)] * len(arrays))
        # Not checked: kernels for attention do not say over which axes their results vary.
        split = jax.shard_map(function, in_specs=specs, out_specs=PartitionSpec(BATCH_AXES), check_vma=False)
        return split(params, *arrays)

    return mapped
