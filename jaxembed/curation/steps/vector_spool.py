"""Vectors of the texts of a step that decides after it has seen all rows. They are stored in a file until then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxembed.curation.mining import MAX_MINED_TEXT_CHARS
from jaxembed.data.batch import EncoderInput
from jaxembed.hub.frozen_encoder import FrozenEncoder


class VectorSpool:
    """Encodes texts as they arrive, and returns all vectors at the end."""

    def __init__(self, folder: Path, encoder: FrozenEncoder, are_queries: bool):
        """Start without texts.

        Args:
            folder: Empty folder of the file.
            encoder: The model.
            are_queries: Encode the texts as queries. Otherwise as documents.
        """
        self._encoder, self._side = encoder, "query" if are_queries else "document"
        self._file = (folder / "vectors").open("w+b")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, texts: Sequence[str]) -> None:
        """Encode and store texts."""
        if texts:
            inputs = [EncoderInput(text[:MAX_MINED_TEXT_CHARS], self._side, "") for text in texts]
            self._file.write(self._encoder.encode(inputs).tobytes())

    def read(self) -> Float[np.ndarray, "n d"]:
        """Return the vectors of all texts, in the order in which they came."""
        self._file.seek(0)
        return np.fromfile(self._file, np.float32).reshape(-1, self._encoder.width)
