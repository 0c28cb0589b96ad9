"""A served model as guide or teacher: its vectors come from an embedding server."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from jaxembed.data.vector_store import VectorStore, make_text_key
from jaxembed.errors import UserError
from jaxembed.hub.frozen_encoder import FrozenEncoder
from jaxembed.verification.http_client import KEY_VARIABLE, HttpClient, parse_root, read_key
from jaxembed.verification.served_vectors import InputRefusedError, connect

SCHEMES = ("http://", "https://")
PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
# Between the vectors of the probe text now and in the store. Rounding in a server may depend on its batches.
MIN_PROBE_COSINE = 0.99


def is_served(name: str) -> bool:
    """Return whether the name of a model is a URL or NAME@URL."""
    return any(scheme in name for scheme in SCHEMES)


def open_served_teacher(name: str, cache: Path) -> FrozenEncoder:
    """Open a model on a server, through the API of OpenAI, TEI, Ollama, vLLM or llama.cpp.

    Texts are sent unchanged, without an instruction or a prompt. Vectors are stored under the name of the model and their
    width. A key is read from the environment.

    Args:
        name: URL of the server, or NAME@URL for one of several models.
        cache: Folder under which vectors are stored.

    Returns:
        The model. Its vectors have unit length.

    Raises:
        UserError: The server cannot be reached, has no such model, or its vectors differ from those in the store.
    """
    model, _, url = name.rpartition("@")
    server = connect(HttpClient(parse_root(url), read_key(KEY_VARIABLE), KEY_VARIABLE), model=model or None)

    def encode_group(texts: list[str], _: str) -> np.ndarray:
        try:
            vectors = server.encode_in_groups(texts)
        except InputRefusedError as refusal:
            raise UserError(f"{name}: the server refuses a text ({refusal}). Raise its limit, or shorten the texts.") from None
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)

    probe = encode_group([PROBE_TEXT], "")
    digest = hashlib.sha256(f"{server.model}\n{probe.shape[1]}".encode()).hexdigest()
    store = VectorStore(cache / "vectors" / digest, probe.shape[1])
    stored_probe = store.fetch([make_text_key("", PROBE_TEXT)], lambda _: probe)
    if (cosine := float(np.sum(stored_probe * probe))) < MIN_PROBE_COSINE:
        raise UserError(
            f"{name}: its vectors are not those that an earlier run stored (cosine {cosine:.3f} for a text). If the model "
            f"has changed, delete {cache / 'vectors' / digest}."
        )
    return FrozenEncoder(server.model or url, digest, probe.shape[1], lambda *_: "", encode_group, store)
