"""Load and run exported folders as their users do: with sentence-transformers, in PyTorch, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.formats.foreign_code import check_names_no_code
from jaxembed.formats.sentence_transformers import MODULES_FILE, TOKEN_POOLING_TYPE


def import_sentence_transformers() -> Any:
    """Import the package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import sentence_transformers
    except ModuleNotFoundError:
        raise UserError("sentence-transformers is not installed. Run pip install '.[eval]'.") from None
    return sentence_transformers


def load_sentence_transformer(folder: Path | str) -> Any:
    """Load a folder with sentence-transformers on the CPU.

    No Python file of the folder is run. A pooling module that jaxembed exported is loaded with the class in
    `jaxembed.formats.token_pooling`.

    Args:
        folder: Sentence-transformers folder.

    Returns:
        A `SentenceTransformer`.

    Raises:
        UserError: It is not such a folder, or its files name other Python code.
    """
    check_is_sentence_transformer(Path(folder))
    check_names_no_code(Path(folder))
    model_class = import_sentence_transformers().SentenceTransformer
    from jaxembed.formats.token_pooling import TokenPooling  # needs torch

    return model_class._load_with_module_classes(
        str(folder), {TOKEN_POOLING_TYPE: TokenPooling}, device="cpu", local_files_only=True, trust_remote_code=False
    )


def check_is_sentence_transformer(folder: Path) -> None:
    """Raise `UserError` if a folder is not a sentence-transformers folder."""
    if not (folder / MODULES_FILE).is_file():
        raise UserError(f"{folder}: not a sentence-transformers folder ({MODULES_FILE} is missing). Export the model first.")


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
