"""jaxembed: text-embedding models out of pretrained decoders, in JAX."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxembed.hub.embedder import Embedder

# Where numpy is imported later: its BLAS multiplies for XLA, on whose cores its threads are not to spin between two products
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when it is needed, so that `--help` answers at once."""
    if name == "Embedder":
        from jaxembed.hub.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'jaxembed' has no attribute {name!r}")
