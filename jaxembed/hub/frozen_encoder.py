"""A model whose vectors serve another: a guide of GISTEmbed, a teacher whose vectors are matched, a miner of negatives."""

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
from jaxembed.data.vector_store import VectorStore, key_of
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError, brief
from jaxembed.files import exists, file_digest
from jaxembed.formats.sentence_transformers import MODULES_FILE
from jaxembed.hub.base import SPEC_FILE, Base, content_hash, find_base, find_folder
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.export import load_sentence_transformer

log = logging.getLogger("jaxembed")

READ = {".json", ".txt", ".model", ".safetensors"}  # files that decide what a sentence-transformers folder computes


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A model that is not trained, with the vectors that it gave so far.

    `lead` is what its own rule makes of a text's side and instruction; texts of one lead are encoded together, by `run`.
    `hash` identifies weights, tokenizer and rule.
    """

    name: str
    hash: str
    width: int
    lead: Callable[[str, str], str]
    run: Callable[[list[str], str], np.ndarray]
    store: VectorStore

    @property
    def identity(self) -> dict[str, str]:
        """For the record of a run."""
        return {"name": self.name, "hash": self.hash}

    def encode(self, texts: Sequence[EncoderInput]) -> np.ndarray:
        """Unit vectors, float32 [N, G]: those in the store as they are, the others computed once and kept there.

        No collective runs in it, and it keeps to this process's devices, so it may go on beside a training step, in another
        thread. `UserError` where the model gives numbers that are not finite.
        """
        return in_groups(texts, [self.lead(text.side, text.instruction) for text in texts], self._fetch, self.width)

    def _fetch(self, texts: list[str], lead: str) -> np.ndarray:
        return self.store.fetch([key_of(lead, text) for text in texts], lambda new: self._run([texts[i] for i in new], lead))

    def _run(self, texts: list[str], lead: str) -> np.ndarray:
        vectors = self.run(texts, lead)
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.name}: gives vectors that are not finite; take another model")
        return vectors


class ZeroEncoder(FrozenEncoder):
    """The same of a plan, which needs shapes alone: zeros for all vectors, and nothing is kept in the store."""

    def encode(self, texts: Sequence[EncoderInput]) -> np.ndarray:
        return np.zeros((len(texts), self.width), np.float32)


def in_groups(
    texts: Sequence[EncoderInput], leads: Sequence[str], run: Callable[[list[str], str], np.ndarray], width: int
) -> np.ndarray:
    """Vectors [N, width] of texts, where those of one lead are run together."""
    members: dict[str, list[int]] = {}
    for i, lead in enumerate(leads):
        members.setdefault(lead, []).append(i)
    out = np.zeros((len(texts), width), np.float32)
    for lead, of_lead in members.items():
        out[of_lead] = run([texts[i].text for i in of_lead], lead)
    return out


def open_frozen_encoder(name: str, cache: Path, mesh: Mesh | None = None) -> FrozenEncoder:
    """Any model that jaxembed loads, else a sentence-transformers folder of another kind, local or by hub id.

    An instruction becomes a prompt by the model's own template; texts without one get the prompt that is stored for their
    side, query or document, if there is one. Models of sentence-transformers know the stored prompts alone. Vectors are
    kept under `cache`. Models that jaxembed loads run on `mesh`, on this process's devices if absent. `UserError` where the
    model cannot be loaded.
    """
    try:
        base = find_base(name)
    except UserError as error:
        folder = Path(name) if exists(Path(name) / MODULES_FILE) else find_folder(name)
        if not exists(folder / MODULES_FILE) or exists(folder / SPEC_FILE):
            raise
        if mesh is not None and mesh.shape["fsdp"] > 1:
            told = "which does not split a model; leave --fsdp out"
            raise UserError(f"{name}: loaded by sentence-transformers, {told}") from None
        log.info("%s: loaded by sentence-transformers (%s)", name, error)
        return _of_sentence_transformers(name, folder, cache)
    mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh
    return _of_embedder(name, base, Embedder.load(name, mesh=mesh), cache)


def _of_embedder(name: str, base: Base, embedder: Embedder, cache: Path) -> FrozenEncoder:
    spec, tokenizer = embedder.spec, embedder.tokenizer.hf_tokenizer.backend_tokenizer.to_str()
    rule = json.dumps([content_hash(base), spec.model_dump(mode="json"), tokenizer], sort_keys=True)
    identity = hashlib.sha256(rule.encode()).hexdigest()

    def lead(side: str, instruction: str) -> str:
        return spec.prompt(instruction) if instruction else spec.prompts.get(side, spec.plain_prompt)

    def run(texts: list[str], prompt: str) -> np.ndarray:
        return embedder.encode(texts, prompt=prompt)

    width = embedder.model.width
    return FrozenEncoder(name, identity, width, lead, run, _store(cache, identity, width))


def _of_sentence_transformers(name: str, folder: Path, cache: Path) -> FrozenEncoder:
    weight_files(name, folder)
    model, identity = _load(name, folder), folder_digest(folder)

    def run(texts: list[str], side: str) -> np.ndarray:
        encode = model.encode_query if side == "query" else model.encode_document
        return np.asarray(encode(texts, normalize_embeddings=True, show_progress_bar=False), np.float32)

    width = run(["width"], "query").shape[1]
    return FrozenEncoder(name, identity, width, lambda side, _: side, run, _store(cache, identity, width))


def weight_files(name: str, folder: Path) -> list[Path]:
    """The files of a sentence-transformers folder that hold its weights; `UserError` where there are none."""
    if not (files := sorted(folder.rglob("*.safetensors"))):
        raise UserError(f"{name}: has no weights in safetensors files; save it anew with sentence-transformers")
    return files


def folder_digest(folder: Path) -> str:
    """The SHA-256 of what decides what a sentence-transformers folder computes."""
    read = sorted(path for path in folder.rglob("*") if path.suffix in READ and path.is_file())
    content = [f"{path.relative_to(folder)}\n{file_digest(path)}" for path in read]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _load(name: str, folder: Path) -> Any:
    try:
        return load_sentence_transformer(folder)
    except UserError:
        raise
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{name}: sentence-transformers cannot load it ({brief(error)})") from None


def _store(cache: Path, identity: str, width: int) -> VectorStore:
    return VectorStore(cache / "vectors" / identity, width)
