"""List the devices of a TPU slice for ahead-of-time compilation. The slice need not exist here."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any

from jaxembed.devices.chips import TPU_CHIPS
from jaxembed.errors import UserError

# Values that the TPU runtime would otherwise request from the metadata server of the machine. Without chips, several processes
# may use the compiler at the same time.
NO_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def skip_tpu_discovery() -> None:
    """Let the TPU compiler load on a machine without a TPU, without warnings. Call it before JAX is imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", **NO_TPU_ENVIRONMENT}


def list_topology_devices(name: str, slices: int = 1) -> tuple[list[Any], int]:
    """Return the devices of TPU slices, and the memory of one device in bytes.

    Args:
        name: Chip and shape of a slice, such as v5e:16x16.
        slices: Number of such slices.

    Raises:
        UserError: The name is malformed, the TPU compiler is not installed, or it does not know such a slice.
    """
    kind, _, shape = name.partition(":")
    if kind not in TPU_CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        kinds = ", ".join(TPU_CHIPS)
        raise UserError(f"--topology: no such slice {name!r}. Expected {kinds} with a shape, such as v5e:16x16 or v5p:4x4x4.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: the TPU compiler is not installed. Run pip install '.[tpu]'.")
    import jax
    from jax.experimental import topologies

    sides = [int(side) for side in shape.split("x")]
    # A host has 2 x 2 chips by default, which does not fit odd sides.
    host_options = {"chips_per_host_bounds": (1, 1, 1)} if any(side % 2 for side in sides[:2]) else {}
    try:
        devices = list(topologies.get_topology_desc(name, platform="tpu", num_slices=slices, **host_options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--topology: the TPU compiler does not know {name} ({reason}). Choose another shape.") from None
    chips_per_device = slices * math.prod(sides) // len(devices)
    return devices, TPU_CHIPS[kind].memory * chips_per_device
