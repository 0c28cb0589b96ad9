"""A cross-encoder of sentence-transformers: a score for a query and a document that it reads together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from jaxembed.data.tokenize import quiet_transformers
from jaxembed.data.vector_store import VectorStore, key_of
from jaxembed.errors import UserError, brief
from jaxembed.hub.base import find_folder
from jaxembed.hub.export import sentence_transformers
from jaxembed.hub.frozen_encoder import folder_digest, weight_files

ScorePairs = Callable[[Sequence[tuple[str, str]]], np.ndarray]  # (query, document) texts -> scores [P]


def open_cross_encoder(name: str, cache: Path) -> ScorePairs:
    """A function from (query, document) pairs to scores, float32 [P]; each is computed once and kept under `cache`.

    `name` is a folder or a hub id. `UserError` where it cannot be loaded, has no trained head, or gives not one finite number
    a pair.
    """
    classes, folder = sentence_transformers(), find_folder(name)
    files = weight_files(name, folder)
    try:
        with quiet_transformers():
            model = classes.CrossEncoder(str(folder), device="cpu", local_files_only=True)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{name}: sentence-transformers cannot load it as a cross-encoder ({brief(error)})") from None
    if model.num_labels != 1:
        raise UserError(f"{name}: gives {model.num_labels} numbers a pair; expected a cross-encoder with one, a relevance")
    if drawn := _not_held(model.model, files):
        told = f"holds no {', '.join(drawn)}, so that its scores would be random"
        raise UserError(f"{name}: {told}; expected a model that was trained as a cross-encoder, head and all")
    store = VectorStore(cache / "scores" / folder_digest(folder), 1)

    def score(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        def computed(places: list[int]) -> np.ndarray:
            found = np.asarray(model.predict([pairs[i] for i in places], show_progress_bar=False), np.float32)
            if not np.isfinite(found).all():
                raise UserError(f"{name}: gives scores that are not finite; take another cross-encoder")
            return found[:, None]

        return store.fetch([key_of(*pair) for pair in pairs], computed)[:, 0]

    return score


def _not_held(model: Any, files: Sequence[Path]) -> list[str]:
    """The parameters of a transformers model's head that no file holds, and that it therefore draws at random."""
    if model is None or model.base_model is model:
        return []
    held: set[str] = set()
    for file in files:
        with safe_open(file, "numpy") as tensors:
            held.update(tensors.keys())
    body = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(body) and name not in held]
