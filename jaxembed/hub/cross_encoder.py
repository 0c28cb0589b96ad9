"""Score (query, document) pairs with a cross-encoder of sentence-transformers, which reads both texts together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from jaxembed.data.tokenize import silence_transformers
from jaxembed.data.vector_store import VectorStore, make_text_key
from jaxembed.errors import UserError, summarize
from jaxembed.formats.foreign_code import check_names_no_code
from jaxembed.hub.folders import find_folder
from jaxembed.hub.frozen_encoder import find_weight_files, hash_folder
from jaxembed.hub.torch_model import import_sentence_transformers

ScorePairs = Callable[[Sequence[tuple[str, str]]], np.ndarray]  # P (query, document) texts -> scores [P]


def open_cross_encoder(name: str, cache: Path) -> ScorePairs:
    """Open a cross-encoder.

    Args:
        name: Local folder or hub id.
        cache: Folder under which scores are stored, so that each is computed once.

    Returns:
        A function from (query, document) pairs to scores, float32 [P].

    Raises:
        UserError: The model cannot be loaded, its head is not trained, or it does not return one finite number per pair.
    """
    st, folder = import_sentence_transformers(), find_folder(name)
    files = find_weight_files(name, folder)
    check_names_no_code(folder)
    try:
        with silence_transformers():
            model = st.CrossEncoder(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{name}: sentence-transformers cannot load it as a cross-encoder ({summarize(error)}).") from None
    if model.num_labels != 1:
        raise UserError(
            f"{name}: returns {model.num_labels} numbers per pair (expected 1, the relevance). Choose another cross-encoder."
        )
    if names := _list_untrained_parameters(model.model, files):
        raise UserError(
            f"{name}: has no {', '.join(names)}, so its scores would be random (expected a trained cross-encoder with its "
            "head). Choose another model."
        )

    def score(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        return np.asarray(model.predict(list(pairs), show_progress_bar=False), np.float32)

    return cache_scores(name, cache / "scores" / hash_folder(folder), score)


def cache_scores(name: str, folder: Path, score: ScorePairs) -> ScorePairs:
    """Wrap a scoring function so that scores are stored by the content of the pairs and computed once.

    Args:
        name: Name of the model, for errors.
        folder: Folder of the store. Another model, or other settings, need another folder.
        score: Computes scores.

    Raises:
        UserError: The function raises it if scores are not finite.
    """
    store = VectorStore(folder, 1)

    def fetch(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        def compute(missing: list[int]) -> np.ndarray:
            scores = score([pairs[i] for i in missing])
            if not np.isfinite(scores).all():
                raise UserError(f"{name}: returns scores that are not finite. Choose another model.")
            return scores[:, None]

        return store.fetch([make_text_key(*pair) for pair in pairs], compute)[:, 0]

    return fetch


def _list_untrained_parameters(model: Any, files: Sequence[Path]) -> list[str]:
    """Return the parameters of a transformers model's head that are in no file and therefore random."""
    if model is None or model.base_model is model:
        return []
    stored_names: set[str] = set()
    for file in files:
        with safe_open(file, "numpy") as tensors:
            stored_names.update(tensors.keys())
    body_prefix = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(body_prefix) and name not in stored_names]
