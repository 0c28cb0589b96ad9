"""Export a model as a Hugging Face / sentence-transformers folder that gives the same vectors.

The folder is built beside its final place. It is moved there only if its vectors, computed by sentence-transformers in
PyTorch, match those of the model.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
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
from jaxembed.hub.readers import ServedModel, list_limits
from jaxembed.hub.scratch import open_scratch_folder
from jaxembed.hub.spec_files import write_spec
from jaxembed.hub.stock_folder import check_exportable, write_stock_folder
from jaxembed.hub.torch_model import import_sentence_transformers

log = logging.getLogger("jaxembed")

BFLOAT16_SLACK = 1.5  # allowed error of a bfloat16 folder, in multiples of the error of transformers' own cast to bfloat16


def export(embedder: Embedder, out: Path, dtype: str, card: Card) -> Parity:
    """Write a model as a sentence-transformers folder. Log what readers cannot do with it, one line each.

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
    probes = select_probes(embedder)
    vectors = encode_probes(embedder, probes)
    with open_scratch_folder(out) as scratch:
        folder, parity = _write_checked_folder(embedder, scratch, out, dtype, probes, vectors)
        # Add our own files, and move the folder to its place.
        write_spec(folder, embedder.spec)
        write_probe_file(folder, probes, vectors)
        served = ServedModel(embedder.spec, embedder.model.decoder, dtype)
        (folder / "README.md").write_text(format_model_card(served, card, parity.error), encoding="utf-8")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes private files, but a server must be able to read them
        shutil.move(str(folder), str(out))
    for line in list_limits(served):
        log.warning("%s: %s", out, line)
    return parity


def _write_checked_folder(
    embedder: Embedder, scratch: Path, out: Path, dtype: str, probes: Mapping[str, list[str]], vectors: np.ndarray
) -> tuple[Path, Parity]:
    """Write the stock folder below `scratch`, and compare its vectors with those of the model.

    Args:
        embedder: The model.
        scratch: Existing folder for temporary files.
        out: Final place of the folder, for errors.
        dtype: Dtype of the weights.
        probes: Texts by prompt.
        vectors: Vectors [N, D] of the probes.

    Returns:
        The folder and the comparison.

    Raises:
        UserError: The vectors differ.
    """
    folder, vectors_per_padding_side = scratch / "float32", np.tile(vectors, (2, 1))
    write_stock_folder(embedder, folder, "float32")
    torch_vectors = encode_probes_torch(folder, embedder.spec, probes)
    parity = compare_vectors(vectors_per_padding_side, torch_vectors, FLOAT32_TOLERANCE)
    if not (parity.passes and parity.cosine >= MIN_COSINE):
        raise UserError(explain_mismatch(out, parity, embedder, folder))
    if dtype == "float32":
        return folder, parity
    # Write bfloat16 weights, and compare with the error that casting the float32 folder in PyTorch makes.
    cast_vectors = encode_probes_torch(folder, embedder.spec, probes, dtype)
    allowed = BFLOAT16_SLACK * compare_vectors(torch_vectors, cast_vectors, 0).error
    folder = scratch / dtype
    write_stock_folder(embedder, folder, dtype)
    parity = compare_vectors(vectors_per_padding_side, encode_probes_torch(folder, embedder.spec, probes), allowed)
    if not parity.passes:
        raise UserError(explain_mismatch(out, parity, embedder, folder))
    return folder, parity


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
