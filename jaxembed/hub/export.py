"""Export a model as a Hugging Face / sentence-transformers folder that gives the same vectors.

The folder is built next to its final place. It is moved there only if its vectors, computed by sentence-transformers in
PyTorch, match those of the model.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxembed.data.scratch import move_into_place, open_scratch_folder
from jaxembed.data.tokenize import starts_with_bos
from jaxembed.errors import UserError
from jaxembed.hub.card import Card, format_model_card, format_precision
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.onnx_export import ONNX_FOLDER, OnnxReport, check_onnx_installed, write_onnx
from jaxembed.hub.parity import (
    FLOAT32_TOLERANCE,
    MIN_COSINE,
    PROBE_TEXTS,
    Parity,
    compare_vectors,
    encode_probes,
    encode_probes_torch,
    list_padding_sides,
    select_probes,
    write_probe_file,
)
from jaxembed.hub.reader_rules import ServedModel
from jaxembed.hub.readers import list_limits
from jaxembed.hub.safe_dtypes import DtypeQuality, list_unsafe_dtypes, measure_dtypes
from jaxembed.hub.spec_files import write_spec
from jaxembed.hub.stock_folder import check_exportable, write_stock_folder
from jaxembed.hub.torch_model import import_sentence_transformers

log = logging.getLogger("jaxembed")

BFLOAT16_SLACK = 1.5  # allowed error of a bfloat16 folder, in multiples of the error of transformers' own cast to bfloat16


OnnxWeights = Literal["float32", "int8"]  # int8: also a graph with int8 weights


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Comparison of an exported folder with the model.

    Attributes:
        parity: Comparison of the folder in sentence-transformers.
        dtypes: Quality of the model's vectors in bfloat16 and float16.
        onnx: Comparison of the ONNX graphs; None without any.
    """

    parity: Parity
    dtypes: tuple[DtypeQuality, ...]
    onnx: OnnxReport | None = None

    def summarize(self) -> dict[str, Any]:
        """Return the comparisons as commands print them."""
        safe_dtypes = ["float32", *(quality.dtype for quality in self.dtypes if quality.is_safe)]
        onnx = {} if self.onnx is None else {"onnx": self.onnx.summarize()}
        return {**self.parity.summarize(), "safe_dtypes": safe_dtypes, **onnx}


def export(embedder: Embedder, out: Path, dtype: str, card: Card, onnx: OnnxWeights | None = None) -> ExportReport:
    """Write a model as a sentence-transformers folder. Log each limitation of a reader in one line.

    Args:
        embedder: The model.
        out: The new folder. Its parent must exist.
        dtype: Dtype of the weights: float32 or bfloat16.
        card: Content of the model card about training.
        onnx: Weights of the ONNX graphs to add. The first graph is always float32. None: no graph.

    Returns:
        Comparison of the vectors of the folder with those of the model.

    Raises:
        UserError: Stock classes cannot represent the model, packages are missing, or the vectors differ. Nothing is written
            then.
    """
    import_sentence_transformers()
    if onnx:
        check_onnx_installed()
    check_exportable(embedder.spec)
    with open_scratch_folder(out) as scratch:
        write_stock_folder(embedder, scratch / "float32", "float32")  # first, because it names weights that are not finite
        probes = select_probes(embedder)
        vectors = encode_probes(embedder, probes)
        folder, parity = _check_folder(embedder, scratch, out, dtype, probes, vectors)
        onnx_report = None
        if onnx:
            # The graph computes in float32 for any dtype of the weights, so it gets the weights before rounding.
            onnx_folder = scratch / ONNX_FOLDER
            onnx_report = write_onnx(embedder, scratch / "float32", onnx_folder, probes, vectors, int8=onnx == "int8")
            shutil.move(str(onnx_folder), str(folder / ONNX_FOLDER))
        report = ExportReport(parity, tuple(measure_dtypes(folder, embedder.spec)), onnx_report)
        # Add our own files, and move the folder to its place.
        write_spec(folder, embedder.spec)
        write_probe_file(folder, probes, vectors)
        served_model = ServedModel(
            embedder.spec, embedder.model.transformer, dtype, has_onnx=onnx is not None, has_head=embedder.model.has_head
        )
        precision_note = format_precision(report.dtypes, report.onnx)
        hf_tokenizer = embedder.tokenizer.hf_tokenizer
        if card.prompt and starts_with_bos(hf_tokenizer):
            card = dataclasses.replace(card, prompt=f"{hf_tokenizer.bos_token}{card.prompt}")
        (folder / "README.md").write_text(format_model_card(served_model, card, parity.error, precision_note), encoding="utf-8")
        move_into_place(folder, out)
    for line in [*list_limits(served_model), *list_unsafe_dtypes(report.dtypes)]:
        log.warning("%s: %s", out, line)
    return report


def _check_folder(
    embedder: Embedder, scratch: Path, out: Path, dtype: str, probes: Mapping[str, list[str]], vectors: np.ndarray
) -> tuple[Path, Parity]:
    """Compare the vectors of the float32 folder with those of the model; write and compare a bfloat16 folder if requested.

    Args:
        embedder: The model.
        scratch: Folder for temporary files, with the float32 folder.
        out: Final place of the folder, for errors.
        dtype: Dtype of the weights.
        probes: Texts by prompt.
        vectors: Vectors [N, D] of the probes.

    Returns:
        The folder in the requested dtype, and its comparison.

    Raises:
        UserError: The vectors differ.
    """
    folder, sides = scratch / "float32", list_padding_sides(embedder.model.transformer)
    vectors_per_padding_side = np.tile(vectors, (len(sides), 1))
    torch_vectors = encode_probes_torch(folder, embedder.spec, probes, sides=sides)
    parity = compare_vectors(vectors_per_padding_side, torch_vectors, FLOAT32_TOLERANCE)
    if not (parity.passes and parity.cosine >= MIN_COSINE):
        raise UserError(_explain_mismatch(out, parity, embedder, folder))
    if dtype == "float32":
        return folder, parity
    # Write bfloat16 weights, and compare with the error that casting the float32 folder in PyTorch makes.
    cast_vectors = encode_probes_torch(folder, embedder.spec, probes, dtype, sides)
    tolerance = BFLOAT16_SLACK * compare_vectors(torch_vectors, cast_vectors, 0).error
    folder = scratch / dtype
    write_stock_folder(embedder, folder, dtype)
    parity = compare_vectors(
        vectors_per_padding_side, encode_probes_torch(folder, embedder.spec, probes, sides=sides), tolerance
    )
    if not parity.passes:
        raise UserError(_explain_mismatch(out, parity, embedder, folder))
    return folder, parity


def _explain_mismatch(out: Path, parity: Parity, embedder: Embedder, folder: Path) -> str:
    """Return the error for vectors that differ. It mentions if stock transformers tokenizes texts differently."""
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
