"""CPU tuning. JAXEMBED_CPU_TUNING=off in the environment turns all of it off.

Everything here was measured to save time on CPUs. Results with and without it agree up to rounding. Set the variable before
`jaxembed` is imported. What it controls:

- `configure_blas_threads`: idle BLAS threads sleep between matmuls.
- `configure_jax`: programs run in the thread that calls them.
- `get_compiler_options`: XLA's order of operations and vector width.
- `retain_freed_memory`, `release_freed_memory`: the allocator keeps large buffers between steps.
- `jaxembed.devices.blas`: numpy's BLAS computes large float32 matmuls.
- `jaxembed.devices.bfloat16`: large bfloat16 matmuls have the form for which XLA has kernels.
- `jaxembed.search.two_pass`: large searches score in bfloat16 first, on CPUs with instructions for it.
- `jaxembed.search.nearest`: FAISS does other searches where it is installed.
- `jaxembed.hub.embedder`: each call encodes `ENCODE_TOKENS_PER_CALL` tokens, and reads the layers as views of the stacked
  parameters.

The attention kernel has its own config key, `model.attention_kernel`.
"""

from __future__ import annotations

import ctypes
import os
import sys

# JAX is imported by the functions that need it: `jaxembed/__init__.py` imports this module, and `--help` should answer at once.

TUNING_VARIABLE = "JAXEMBED_CPU_TUNING"
OPENBLAS_SPIN_LOG2_CYCLES = "4"  # how long an idle OpenBLAS thread spins before it sleeps; 4 is the minimum
ENCODE_TOKENS_PER_CALL = 2048  # more would not fit into a CPU's caches
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt in glibc's malloc.h


def is_tuning_on() -> bool:
    """Return whether CPU tuning is on (JAXEMBED_CPU_TUNING)."""
    return os.environ.get(TUNING_VARIABLE, "on").lower() != "off"


def is_tuned(platform: str) -> bool:
    """Return whether code for a platform such as "cpu" or "tpu" is subject to CPU tuning."""
    return platform == "cpu" and is_tuning_on()


def configure_blas_threads() -> None:
    """Let idle BLAS threads sleep between matmuls, unless the environment chooses otherwise. Call it before numpy is imported.

    numpy's BLAS computes large matmuls for XLA, whose own threads need the cores between them.
    """
    if is_tuning_on():
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", OPENBLAS_SPIN_LOG2_CYCLES)


def configure_jax() -> None:
    """Run programs for CPUs in the thread that calls them. Call it before JAX's first use.

    The main thread then allocates all buffers, which `retain_freed_memory` relies on.
    """
    import jax

    if is_tuning_on():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def get_compiler_options() -> dict[str, str]:
    """Return the options with which to compile a model's program (`compiler_options` of `jax.jit`).

    On CPUs they choose:

    - XLA's memory-optimized order of operations. It needs less memory, and no two matmuls run at once on a core each.
    - Vectors as wide as the widest registers. XLA's default is half of AVX-512's.
    """
    from jaxembed.devices.mesh import get_target_platform

    if not is_tuned(get_target_platform()):
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_cpu_prefer_vector_width": "512"}


def retain_freed_memory() -> None:
    """Keep large buffers that the main thread frees for the next allocation, on CPUs under glibc.

    Fetching pages from the system, and zeroing them, takes a noticeable part of a step (docs/dev/log.md).
    """
    if libc := _load_glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Return the memory that `retain_freed_memory` keeps to the system.

    Call it before compiling another program, whose small buffers would fragment the large ones.
    """
    if libc := _load_glibc():
        libc.malloc_trim(0)


def _load_glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc and CPU tuning applies to this process."""
    import jax

    libc = ctypes.CDLL(None) if sys.platform == "linux" and is_tuned(jax.default_backend()) else None
    return libc if hasattr(libc, "mallopt") else None
