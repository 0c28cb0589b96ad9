"""Models whose vectors help to train or mine for another model: guides (GISTEmbed), teachers, and miners of negatives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxembed.data.batch import EncoderInput
from jaxembed.data.vector_store import VectorStore, make_text_key
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError, summarize
from jaxembed.files import compute_file_digest, exists
from jaxembed.formats.sentence_transformers import MODULES_FILE
from jaxembed.hub.base import Base, FolderBase
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.folders import find_folder
from jaxembed.hub.resolve import find_base
from jaxembed.hub.restore import RunBase
from jaxembed.hub.spec_files import EARLIER_DEFAULTS, SPEC_FILE, has_spec_files
from jaxembed.hub.torch_model import load_sentence_transformer

log = logging.getLogger("jaxembed")

EncodeGroup = Callable[[list[str], str], np.ndarray]  # (N texts, their common prompt) -> vectors [N, D]

HASHED_SUFFIXES = {".json", ".txt", ".model", ".safetensors"}  # files that determine the vectors of a folder


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A model that is not trained, with a store of the vectors it has computed.

    Attributes:
        name: Name that the user gave.
        hash: Identifies weights, tokenizer and spec.
        width: Width of the vectors.
        select_prompt: Maps the side (query or document) and the instruction of a text to its prompt.
        encode_group: Encodes texts that have the same prompt.
        store: Vectors by prompt and text.
    """

    name: str
    hash: str
    width: int
    select_prompt: Callable[[str, str], str]
    encode_group: EncodeGroup
    store: VectorStore

    @property
    def identity(self) -> dict[str, str]:
        """Name and hash, as a run records them."""
        return {"name": self.name, "hash": self.hash}

    def encode(self, texts: Sequence[EncoderInput]) -> np.ndarray:
        """Encode texts. Vectors in the store are read; the others are computed once and stored.

        It runs no collective and uses the devices of this process only, so another thread may call it during a training step.

        Returns:
            Unit vectors, float32 [N, D].

        Raises:
            UserError: The model returns values that are not finite.
        """
        prompts = [self.select_prompt(text.side, text.instruction) for text in texts]
        return encode_in_groups(texts, prompts, self._read_or_encode, self.width)

    def _read_or_encode(self, texts: list[str], prompt: str) -> np.ndarray:
        keys = [make_text_key(prompt, text) for text in texts]
        return self.store.fetch(keys, lambda missing: self._encode_new([texts[i] for i in missing], prompt))

    def _encode_new(self, texts: list[str], prompt: str) -> np.ndarray:
        vectors = self.encode_group(texts, prompt)
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.name}: returns vectors that are not finite. Choose another model.")
        return vectors


class ZeroEncoder(FrozenEncoder):
    """Returns zeros instead of vectors, and stores nothing. For planning, which needs only shapes."""

    def encode(self, texts: Sequence[EncoderInput]) -> np.ndarray:
        """Return zeros, float32 [N, D]."""
        return np.zeros((len(texts), self.width), np.float32)


def encode_in_groups(
    texts: Sequence[EncoderInput], prompts: Sequence[str], encode_group: EncodeGroup, width: int
) -> np.ndarray:
    """Encode texts in groups with the same prompt.

    Args:
        texts: N texts.
        prompts: Prompt of each text.
        encode_group: Encodes texts that have the same prompt.
        width: Width of the vectors.

    Returns:
        Vectors, float32 [N, width], in the order of `texts`.
    """
    indices_by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        indices_by_prompt.setdefault(prompt, []).append(i)
    out = np.zeros((len(texts), width), np.float32)
    for prompt, indices in indices_by_prompt.items():
        out[indices] = encode_group([texts[i].text for i in indices], prompt)
    return out


def check_model_exists(name: str) -> None:
    """Raise `UserError` if `open_frozen_encoder` would find no folder. A hub model is downloaded."""
    if not exists(Path(name) / MODULES_FILE):
        find_folder(name)


def open_frozen_encoder(name: str, cache: Path, mesh: Mesh | None = None, recorded_hash: str = "") -> FrozenEncoder:
    """Open a model that jaxembed can load, or any other sentence-transformers folder.

    The template of the model turns an instruction into a prompt. Texts without an instruction get the prompt that is stored
    for their side. Folders that only sentence-transformers can load use their stored prompts, regardless of the instruction.

    Args:
        name: Name of the model: a local folder, a run directory, or a hub id.
        cache: Folder under which vectors are stored.
        mesh: Devices for models that jaxembed loads. Default: the devices of this process.
        recorded_hash: Hash of the model in the run that resumes, if any. A folder whose files do not say how texts become
            vectors is read with the defaults of earlier versions if these give that hash. A folder that an earlier version
            loaded with sentence-transformers is loaded in the same way.

    Raises:
        UserError: The model cannot be loaded.
    """
    if recorded_hash and exists(Path(name) / MODULES_FILE) and hash_folder(Path(name)) == recorded_hash:
        return _open_sentence_transformer(name, Path(name), cache)
    try:
        base = find_base(name)
    except UserError as error:
        folder = Path(name) if exists(Path(name) / MODULES_FILE) else find_folder(name)
        if not exists(folder / MODULES_FILE) or exists(folder / SPEC_FILE):
            raise
        if mesh is not None and mesh.shape["fsdp"] > 1:
            raise UserError(
                f"{name}: loaded by sentence-transformers, which cannot split a model over devices. Omit --fsdp."
            ) from None
        reason = str(error).removesuffix(".")
        line = "%s: loaded by sentence-transformers (%s); texts get the prompts stored there, regardless of their instruction"
        log.info(line, name, reason)
        return _open_sentence_transformer(name, folder, cache)
    mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh
    return _open_embedder(name, base, Embedder.load(name, mesh=mesh), cache, recorded_hash)


def _open_embedder(name: str, base: Base, embedder: Embedder, cache: Path, recorded_hash: str) -> FrozenEncoder:
    # Hashing reads all weights. The embedder has the hash, except that of a run, which has another one.
    weights_hash = base.hash() if isinstance(base, RunBase) else embedder.weights_hash
    digest = _hash_embedder(weights_hash, embedder)
    if recorded_hash not in ("", digest) and isinstance(base, FolderBase) and not has_spec_files(base.folder):
        earlier = embedder.with_spec(embedder.spec.replace(**EARLIER_DEFAULTS))
        if _hash_embedder(weights_hash, earlier) == recorded_hash:
            embedder, digest = earlier, recorded_hash
    spec = embedder.spec

    def select_prompt(side: str, instruction: str) -> str:
        if instruction and not spec.fixed_prompts:
            return spec.build_prompt(instruction)
        return spec.prompts.get(side, spec.plain_prompt)

    def encode_group(texts: list[str], prompt: str) -> np.ndarray:
        return embedder.encode(texts, prompt=prompt)

    width = embedder.model.width
    return FrozenEncoder(name, digest, width, select_prompt, encode_group, _open_store(cache, digest, width))


def _hash_embedder(weights_hash: str, embedder: Embedder) -> str:
    """Return what identifies the vectors of a model: the SHA-256 of the hash of its weights, its spec, and its tokenizer."""
    tokenizer_state = embedder.tokenizer.hf_tokenizer.backend_tokenizer.to_str()
    identity = json.dumps([weights_hash, embedder.spec.describe_vectors(), tokenizer_state], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def _open_sentence_transformer(name: str, folder: Path, cache: Path) -> FrozenEncoder:
    """Open a folder with sentence-transformers. It has one prompt per side, so the side is passed in place of a prompt."""
    find_weight_files(name, folder)
    model, digest = _load_sentence_transformer(name, folder), hash_folder(folder)

    def encode_group(texts: list[str], side: str) -> np.ndarray:
        encode = model.encode_query if side == "query" else model.encode_document
        return np.asarray(encode(texts, normalize_embeddings=True, show_progress_bar=False), np.float32)

    width = encode_group(["a text"], "query").shape[1]
    return FrozenEncoder(name, digest, width, lambda side, _: side, encode_group, _open_store(cache, digest, width))


def find_weight_files(name: str, folder: Path) -> list[Path]:
    """Return the safetensors files of a sentence-transformers folder.

    Raises:
        UserError: The folder has none.
    """
    if not (files := sorted(folder.rglob("*.safetensors"))):
        raise UserError(f"{name}: has no weights in safetensors files. Save it again with sentence-transformers.")
    return files


def hash_folder(folder: Path) -> str:
    """Return the SHA-256 of the files that determine the vectors of a sentence-transformers folder, in hexadecimal digits."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in HASHED_SUFFIXES and path.is_file())
    content = [f"{path.relative_to(folder)}\n{compute_file_digest(path)}" for path in paths]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _load_sentence_transformer(name: str, folder: Path) -> Any:
    try:
        return load_sentence_transformer(folder)
    except UserError:
        raise
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{name}: sentence-transformers cannot load it ({summarize(error)}).") from None


def _open_store(cache: Path, digest: str, width: int) -> VectorStore:
    return VectorStore(cache / "vectors" / digest, width)
