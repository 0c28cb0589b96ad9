"""Models on disk: bases, published layouts, exports."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then, as it needs JAX."""
    if name == "load_sentence_transformer":
        from jaxembed.hub.export import load_sentence_transformer

        return load_sentence_transformer
    raise AttributeError(f"module 'jaxembed.hub' has no attribute {name!r}")
