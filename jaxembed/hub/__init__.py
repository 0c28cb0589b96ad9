"""Models on disk and on the hub: find, load, restore, merge and export them."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because it needs JAX, which is slow to import."""
    if name == "load_sentence_transformer":
        from jaxembed.hub.torch_model import load_sentence_transformer

        return load_sentence_transformer
    raise AttributeError(f"module 'jaxembed.hub' has no attribute {name!r}")
