"""An exported folder under sentence-transformers as an mteb encoder: scores what users will deploy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxembed.evaluation.mteb_encoder import MtebEncoder
from jaxembed.hub.base import content_hash, find_base
from jaxembed.hub.export import encode_torch, load_sentence_transformer


def load_torch(folder: Path) -> MtebEncoder:
    """The folder by plain sentence-transformers, under the same instructions as the JAX model gets."""
    base = find_base(str(folder))
    model = load_sentence_transformer(folder)

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        return encode_torch(model, texts, prompt)

    return MtebEncoder(encode, base.spec, f"{folder.name}-torch", content_hash(base)[:16])
