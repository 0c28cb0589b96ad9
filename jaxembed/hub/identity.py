"""Identify a model by everything that determines its vectors, for caches of results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from jaxembed.hub.embedder import Embedder

DIGEST_CHARS = 16


def compute_model_digest(embedder: Embedder) -> str:
    """Return a digest of a model's weights, transformer, spec, tokenizer, and dtype of computation.

    Two models with equal digests give equal vectors. The name and the location of a model do not matter.

    Args:
        embedder: A model that was loaded from a run or a folder.

    Returns:
        Hexadecimal digits.
    """
    identity = [
        embedder.weights_hash,
        dataclasses.asdict(embedder.model.transformer),
        embedder.spec.describe_vectors(),
        read_tokenizer_state(embedder.tokenizer.hf_tokenizer),
        np.dtype(embedder.model.compute.dtype).name,
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARS]


def read_tokenizer_state(hf_tokenizer: Any) -> dict[str, Any]:
    """Return the content of a tokenizer's tokenizer.json without truncation and padding, which every call may change."""
    state = json.loads(hf_tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in state.items() if key not in ("truncation", "padding")}
