"""Load and run exported folders as their users do: with sentence-transformers, in PyTorch, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.formats.sentence_transformers import MODULES_FILE, has_own_token_pooling


def import_sentence_transformers() -> Any:
    """Import the package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import sentence_transformers
    except ModuleNotFoundError:
        raise UserError('sentence-transformers is not installed. Run pip install "jaxembed[eval]".') from None
    return sentence_transformers


def load_sentence_transformer(folder: Path | str) -> Any:
    """Load a folder with sentence-transformers on the CPU.

    Of the Python files in the folder, only the pooling module that jaxembed wrote is run.

    Args:
        folder: Sentence-transformers folder.

    Returns:
        A `SentenceTransformer`.

    Raises:
        UserError: It is not such a folder.
    """
    if not (Path(folder) / MODULES_FILE).is_file():
        raise UserError(f"{folder}: not a sentence-transformers folder ({MODULES_FILE} is missing). Export the model first.")
    return import_sentence_transformers().SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, trust_remote_code=has_own_token_pooling(Path(folder))
    )


def encode_torch(model: Any, texts: Sequence[str], prompt: str, batch_size: int = 32) -> np.ndarray:
    """Encode texts with a `SentenceTransformer`.

    Args:
        model: The model.
        texts: N texts.
        prompt: Text that precedes every text; '' for none.
        batch_size: Texts that are encoded at once.

    Returns:
        Unit vectors, float32 [N, D].
    """
    vectors = model.encode(
        list(texts), prompt=prompt, batch_size=batch_size, normalize_embeddings=True, convert_to_tensor=True,
        show_progress_bar=False,
    )  # fmt: skip
    return np.asarray(vectors.float().cpu().numpy())
