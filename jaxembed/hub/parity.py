"""Compare the vectors of an exported folder with those of the model on a few probe texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json_value
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.families import TransformerConfig

PROBE_FILE = "probe.json"
FLOAT32_TOLERANCE = 1e-4  # largest difference of a component of a unit vector
MIN_COSINE = 0.9999
PROBE_INSTRUCTION = "Given a question, find the passage that answers it"
PROBE_TEXTS = [
    "What is a contrastive loss?",
    "A short text.",
    "naïve café, 数学 and an emoji 🙂",
    "def add(a: int, b: int) -> int:\n    return a + b",
    "Embeddings of longer texts must not depend on the padding of shorter ones in the same batch. " * 8,
    "This text is longer than the model reads, so its end is cut and only its special tokens stay. " * 400,
]


@dataclasses.dataclass(frozen=True)
class Parity:
    """Distance between two sets of unit vectors of the same texts.

    Attributes:
        error: Largest difference of a component.
        allowed: Largest `error` that passes.
        cosine: Smallest cosine of two vectors of the same text.
    """

    error: float
    allowed: float
    cosine: float

    @property
    def passes(self) -> bool:
        """Whether the vectors agree. False if any value is NaN."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        """Return the comparison as part of an error message."""
        return (
            f"the exported vectors differ from the model's by {self.error:.2e} "
            f"(allowed {self.allowed:.2e}, cosine {self.cosine:.6f})"
        )

    def summarize(self) -> dict[str, float]:
        """Return the comparison as commands print it."""
        return {"largest_difference": self.error, "allowed": self.allowed, "least_cosine": self.cosine}


def compare_vectors(a: np.ndarray, b: np.ndarray, tolerance: float) -> Parity:
    """Compare two arrays of unit vectors [N, D], row by row."""
    return Parity(float(np.abs(a - b).max()), tolerance, float(np.sum(a * b, axis=1).min()))


def select_probes(embedder: Embedder, *, truncated: bool = True) -> dict[str, list[str]]:
    """Return probe texts by prompt: no instruction, an instruction, and every prompt that is stored with the model.

    Where truncated texts are left out, so are prompts under which every probe is truncated.

    Args:
        embedder: The model.
        truncated: Include texts that the model truncates. For a prompt with a suffix they are always left out, because
            stock classes would truncate the suffix.
    """
    spec = embedder.spec
    prompts = dict.fromkeys([spec.plain_prompt, spec.build_prompt(PROBE_INSTRUCTION), *spec.prompts.values()])
    texts_by_prompt = {
        prompt: PROBE_TEXTS if truncated and not (prompt and spec.query_suffix) else _select_complete(embedder, prompt)
        for prompt in prompts
    }
    return {prompt: texts for prompt, texts in texts_by_prompt.items() if texts}


def _select_complete(embedder: Embedder, prompt: str) -> list[str]:
    """Return the probe texts that the model does not truncate."""
    lengths = embedder.tokenizer.count_untruncated_tokens(PROBE_TEXTS, [prompt] * len(PROBE_TEXTS))
    return [text for text, length in zip(PROBE_TEXTS, lengths, strict=True) if length <= embedder.spec.max_length]


def encode_probes(embedder: Embedder, probes: Mapping[str, list[str]]) -> np.ndarray:
    """Encode the probes of every prompt with the model, [N, D]."""
    return np.concatenate([embedder.encode(texts, prompt=prompt) for prompt, texts in probes.items()])


def list_padding_sides(transformer: TransformerConfig) -> tuple[str, ...]:
    """Return the sides on which a stock folder may be padded.

    BERT counts positions from the start of a padded row. RoBERTa, whose positions start after the id of the padding token,
    skips padding.
    """
    counts_padding = transformer.position_kind == "learned" and not transformer.position_offset
    return ("right",) if counts_padding else ("right", "left")


def encode_probes_torch(
    folder: Path,
    spec: EmbeddingSpec,
    probes: Mapping[str, list[str]],
    dtype: str | None = None,
    sides: Sequence[str] = ("right", "left"),
) -> np.ndarray:
    """Encode the probes with sentence-transformers, with padding on each side.

    Args:
        folder: The exported folder.
        spec: Spec of the model. Its suffix is appended to texts with a prompt, as users must do.
        probes: Texts by prompt.
        dtype: Dtype of the computation. Default: the folder's.
        sides: Sides of the padding (`list_padding_sides`).

    Returns:
        Unit vectors [sides * N, D].
    """
    import torch

    model = load_sentence_transformer(folder)
    return encode_probes_with(model.to(getattr(torch, dtype)) if dtype else model, spec, probes, sides)


def encode_probes_with(model: Any, spec: EmbeddingSpec, probes: Mapping[str, list[str]], sides: Sequence[str]) -> np.ndarray:
    """Encode the probes with a `SentenceTransformer`, as `encode_probes_torch` does with that of a folder."""
    vectors = []
    for side in sides:
        model.tokenizer.padding_side = side
        for prompt, texts in probes.items():
            vectors.append(encode_torch(model, [text + spec.get_suffix(prompt) for text in texts], prompt))
    return np.concatenate(vectors)


def write_probe_file(folder: Path, probes: Mapping[str, list[str]], vectors: np.ndarray) -> None:
    """Write probe.json: texts, their prompts and their vectors, with which users can check the folder."""
    inputs = [(prompt, text) for prompt, texts in probes.items() for text in texts]
    rows = [
        {"prompt": prompt, "text": text, "vector": [round(float(x), 7) for x in vector]}
        for (prompt, text), vector in zip(inputs, vectors, strict=True)
    ]
    (folder / PROBE_FILE).write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Probe:
    """An entry of probe.json: a text with its prompt, and the unit vector that the exported model gave, float32 [D]."""

    prompt: str
    text: str
    vector: np.ndarray


def read_probe_file(folder: Path) -> list[Probe]:
    """Read probe.json of an exported folder.

    Raises:
        UserError: The folder has none, or it is damaged.
    """
    path = folder / PROBE_FILE
    if not exists(path):
        raise UserError(f"{folder}: has no {PROBE_FILE}, which `jaxembed export` writes. Export the model again.")
    rows = read_json_value(path)
    try:
        probes = [Probe(row["prompt"], row["text"], np.array(row["vector"], np.float32)) for row in rows]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: not a list of prompts, texts and vectors. Export the model again.") from None
    shapes = {probe.vector.shape for probe in probes}
    are_strings = all(isinstance(entry, str) for probe in probes for entry in (probe.prompt, probe.text))
    if not are_strings or len(shapes) != 1 or len(shapes.pop()) != 1:
        raise UserError(f"{path}: damaged (expected prompts, texts, and vectors of one width). Export the model again.")
    return probes
