"""One table of accelerator chips, with the figures that their vendors publish.

Sources: Google Cloud's pages on TPU v4, v5e, v5p and v6e; NVIDIA's data sheets of A100, L4, H100 (SXM, NVL and PCIe) and H200,
and its Ada architecture white paper (RTX 4090). Where a sheet states a rate with sparsity, the table has half of it.
"""

from __future__ import annotations

import dataclasses
import re

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
        device_kind: Regular expression for JAX's name of the device (`device.device_kind`).
        peak_flops: FLOP/s of dense bfloat16 matmuls with float32 sums.
    """

    device_kind: str
    peak_flops: float


@dataclasses.dataclass(frozen=True)
class TpuChip(Chip):
    """Published figures of a TPU chip, which a plan for a slice needs.

    Attributes:
        memory: Bytes of memory.
        memory_bandwidth: Bytes per second to and from memory.
        link_bandwidth: Bytes per second to the neighboring chips.
    """

    memory: int
    memory_bandwidth: float
    link_bandwidth: float


# By the name that a topology such as v5e:16x16 begins with.
TPU_CHIPS = {
    "v4": TpuChip(r"^TPU v4$", 275e12, 32 * GIB, 1228e9, 300e9),
    "v5e": TpuChip(r"^TPU (v5 lite|v5e)$", 197e12, 16 * GIB, 819e9, 200e9),
    "v5p": TpuChip(r"^TPU (v5|v5p)$", 459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": TpuChip(r"^TPU (v6 lite|v6e)$", 918e12, 32 * GIB, 1640e9, 448e9),
}
GPU_CHIPS = (
    Chip(r"\bH200\b", 989e12),
    Chip(r"\bH100 NVL\b", 835e12),
    Chip(r"\bH100 PCIe\b", 756e12),
    Chip(r"\bH100\b", 989e12),
    Chip(r"\bA100\b", 312e12),
    Chip(r"\bL4\b", 121e12),
    Chip(r"\bRTX 4090$", 165e12),
)
CHIPS: tuple[Chip, ...] = (*TPU_CHIPS.values(), *GPU_CHIPS)


def find_chip(device_kind: str) -> Chip | None:
    """Return the first chip in the table whose pattern matches JAX's name of a device, or None."""
    return next((chip for chip in CHIPS if re.search(chip.device_kind, device_kind)), None)
