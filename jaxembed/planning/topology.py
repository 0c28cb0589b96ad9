"""Devices that are not here: a TPU slice by name, as the TPU compiler knows it, and what its chips can do."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from jaxembed.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip: memory, bfloat16 operations, bytes from memory and bytes to its neighbours, a second."""

    memory: int
    flops: float
    memory_rate: float
    link_rate: float


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9),
}


def look_for_no_tpu() -> None:
    """Lets the TPU compiler load where there is no TPU, without warnings of that; to be called before JAX is."""
    none_here = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    os.environ |= {"JAX_PLATFORMS": "cpu", **none_here}


def topology_devices(name: str, slices: int = 1) -> tuple[list[Any], int]:
    """The devices of so many slices such as v5e:16x16, and the memory of one in bytes. `UserError` where that is not to be
    had.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(f"--topology is {name!r}; expected {', '.join(CHIPS)} with a shape, such as v5e:16x16 or v5p:4x4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology needs the TPU compiler, which is not installed; pip install 'jaxembed[tpu]'")
    import jax
    from jax.experimental import topologies

    sides = [int(n) for n in shape.split("x")]
    host = {"chips_per_host_bounds": (1, 1, 1)} if any(side % 2 for side in sides[:2]) else {}  # by default four chips
    try:
        devices = list(topologies.get_topology_desc(name, platform="tpu", num_slices=slices, **host).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        told = str(error).splitlines()[0][:200]
        raise UserError(f"--topology {name}: the TPU compiler knows no such slice ({told}); name another shape") from None
    return devices, CHIPS[kind].memory * slices * math.prod(sides) // len(devices)
