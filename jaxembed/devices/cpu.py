"""What only CPUs need: compiler options, and the allocator's memory between steps."""

from __future__ import annotations

import ctypes
import sys

import jax

from jaxembed.devices.mesh import target_platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def compiler_options() -> dict[str, str]:
    """Options for compiling a model's program (`jax.jit`'s compiler_options).

    On CPUs, XLA's memory-minded order of operations: less memory, and products that do not run two at once, a core each.
    And vectors as wide as the widest registers there are, where XLA's default is half of AVX-512's.
    """
    if target_platform() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_cpu_prefer_vector_width": "512"}


def retain_freed_memory() -> None:
    """On CPUs under glibc, large buffers that the main thread gives back are kept for the next: pages fetched anew from the
    system, and zeroed, for every step took a seventh of its time.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Return the memory that `retain_freed_memory` holds to the system.

    Call it before compiling another program, whose small buffers would fragment the large ones.
    """
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of a process that computes on CPUs, if it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" and jax.default_backend() == "cpu" else None
    return libc if hasattr(libc, "mallopt") else None
