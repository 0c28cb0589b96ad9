"""Run an exported folder with sentence-transformers for evaluation, to score what users deploy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxembed.evaluation.task_encoder import TaskEncoder, name_model
from jaxembed.hub.frozen_encoder import hash_folder
from jaxembed.hub.identity import DIGEST_CHARS
from jaxembed.hub.resolve import find_base
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer


def load_torch_encoder(folder: Path, max_length: int | None = None) -> TaskEncoder:
    """Load a folder with plain sentence-transformers. It gets the same instructions as the JAX model.

    Args:
        folder: The folder.
        max_length: Maximum tokens of a text. Default: the folder's.
    """
    base = find_base(str(folder))
    model = load_sentence_transformer(folder)
    spec = base.spec
    if max_length is not None:
        model.max_seq_length = max_length
        spec = spec.replace(max_length=max_length)

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        suffix = spec.get_suffix(prompt)
        return encode_torch(model, [text + suffix for text in texts], prompt)

    # The digest covers the whole folder, because sentence-transformers may read any of its files.
    revision = f"folder-{hash_folder(folder)[:DIGEST_CHARS]}"
    if max_length is not None:
        revision += f"-{max_length}"
    if spec.query_suffix:  # earlier versions stored scores without it
        revision += "-suffix"
    return TaskEncoder(encode, spec, f"{name_model(folder)}-torch", revision)
