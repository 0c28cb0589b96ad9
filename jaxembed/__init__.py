"""jaxembed: text-embedding models from pretrained language models, in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxembed.devices.cpu import configure_blas_threads

if TYPE_CHECKING:
    from jaxembed.config import load_config
    from jaxembed.hub.embedder import Embedder
    from jaxembed.runs.train import train

configure_blas_threads()  # before numpy is imported

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__", "load_config", "train"]
_MODULES = {"Embedder": "jaxembed.hub.embedder", "load_config": "jaxembed.config", "train": "jaxembed.runs.train"}


def __getattr__(name: str) -> Any:
    """Import a public name, and JAX with it, only when it is used, so that `--help` answers at once."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'jaxembed' has no attribute {name!r}")
