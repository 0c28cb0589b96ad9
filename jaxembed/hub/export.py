"""Export a model as a Hugging Face / sentence-transformers folder that gives the same vectors.

The folder is built beside its final place. It is moved there only if its vectors, computed by sentence-transformers in
PyTorch, match those of the model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from jaxembed.errors import UserError
from jaxembed.hub.card import Card, format_model_card
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.parity import (
    FLOAT32_TOLERANCE,
    MIN_COSINE,
    PROBE_TEXTS,
    Parity,
    compare_vectors,
    encode_probes,
    encode_probes_torch,
    select_probes,
    write_probe_file,
)
from jaxembed.hub.scratch import open_scratch_folder
from jaxembed.hub.spec_files import write_spec
from jaxembed.hub.stock_folder import check_exportable, write_stock_folder
from jaxembed.hub.torch_model import import_sentence_transformers

BFLOAT16_SLACK = 1.5  # allowed error of a bfloat16 folder, in multiples of the error of transformers' own cast to bfloat16


def export(embedder: Embedder, out: Path, dtype: str, card: Card) -> Parity:
    """Write a model as a sentence-transformers folder.

    Args:
        embedder: The model.
        out: The new folder. Its parent must exist.
        dtype: Dtype of the weights: float32 or bfloat16.
        card: What the model card says about training.

    Returns:
        How far the vectors of the folder are from those of the model.

    Raises:
        UserError: Stock classes cannot represent the model, or the vectors differ. Nothing is written then.
    """
    import_sentence_transformers()
    check_exportable(embedder.spec)
    with open_scratch_folder(out) as scratch:
        # Write float32 weights and compare.
        folder = write_stock_folder(embedder, scratch, "float32")
        probes = select_probes(embedder)
        vectors = encode_probes(embedder, probes)
        vectors_per_padding_side = np.tile(vectors, (2, 1))
        torch_vectors = encode_probes_torch(folder, embedder.spec, probes)
        parity = compare_vectors(vectors_per_padding_side, torch_vectors, FLOAT32_TOLERANCE)
        if not (parity.passes and parity.cosine >= MIN_COSINE):
            raise UserError(explain_mismatch(out, parity, embedder, folder))
        # Write bfloat16 weights, and compare with the error that casting the float32 folder in PyTorch makes.
        if dtype == "bfloat16":
            cast_vectors = encode_probes_torch(folder, embedder.spec, probes, dtype)
            allowed = BFLOAT16_SLACK * compare_vectors(torch_vectors, cast_vectors, 0).error
            folder = write_stock_folder(embedder, scratch, dtype)
            parity = compare_vectors(vectors_per_padding_side, encode_probes_torch(folder, embedder.spec, probes), allowed)
            if not parity.passes:
                raise UserError(explain_mismatch(out, parity, embedder, folder))
        # Add our own files, and move the folder to its place.
        write_spec(folder, embedder.spec)
        write_probe_file(folder, probes, vectors)
        (folder / "README.md").write_text(format_model_card(embedder.spec, card, parity.error), encoding="utf-8")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes private files, but a server must be able to read them
        shutil.move(str(folder), str(out))
    return parity


def explain_mismatch(out: Path, parity: Parity, embedder: Embedder, folder: Path) -> str:
    """Return the error for vectors that differ. It says so if stock transformers tokenizes texts differently."""
    from transformers import AutoTokenizer

    stock_ids = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)(PROBE_TEXTS, truncation=True)["input_ids"]
    ids = embedder.tokenizer(PROBE_TEXTS, [""] * len(PROBE_TEXTS)).ids
    pairs = zip(PROBE_TEXTS, ids, stock_ids, strict=True)
    different = [text for text, text_ids, stock_text_ids in pairs if list(text_ids) != list(stock_text_ids)]
    reason = ""
    if different:
        reason = (
            f" Stock transformers tokenizes texts differently, for example {different[0][:40]!r}: the model_type of the base "
            "does not fit its tokenizer, or the tokenizer has settings that are not saved."
        )
    return f"{out}: not written, because {parity}.{reason}"
