"""A cross-encoder of sentence-transformers: a score for a query and a document that it reads together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxembed.data.vector_store import VectorStore, key_of
from jaxembed.errors import UserError, brief
from jaxembed.hub.base import find_folder
from jaxembed.hub.export import sentence_transformers
from jaxembed.hub.other_model import folder_digest

ScorePairs = Callable[[Sequence[tuple[str, str]]], np.ndarray]  # (query, document) texts -> scores [P]


def open_cross_encoder(name: str, cache: Path) -> ScorePairs:
    """A function from (query, document) pairs to scores, float32 [P]; each is computed once and kept under `cache`.

    `name` is a folder or a hub id. `UserError` where it cannot be loaded, or gives not one finite number a pair.
    """
    classes, folder = sentence_transformers(), find_folder(name)
    try:
        model = classes.CrossEncoder(str(folder), device="cpu", local_files_only=True)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{name}: sentence-transformers cannot load it as a cross-encoder ({brief(error)})") from None
    if model.num_labels != 1:
        raise UserError(f"{name}: gives {model.num_labels} numbers a pair; expected a cross-encoder with one, a relevance")
    store = VectorStore(cache / "scores" / folder_digest(folder), 1)

    def score(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        def computed(places: list[int]) -> np.ndarray:
            found = np.asarray(model.predict([pairs[i] for i in places], show_progress_bar=False), np.float32)
            if not np.isfinite(found).all():
                raise UserError(f"{name}: gives scores that are not finite; take another cross-encoder")
            return found[:, None]

        return store.fetch([key_of(*pair) for pair in pairs], computed)[:, 0]

    return score
