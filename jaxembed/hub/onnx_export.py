"""Add ONNX graphs to an exported folder, and compare them with the model in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.errors import UserError, summarize
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.parity import (
    FLOAT32_TOLERANCE,
    PROBE_TEXTS,
    Parity,
    compare_vectors,
    encode_probes,
    encode_probes_with,
    list_padding_sides,
)
from jaxembed.hub.reader_rules import ServedModel
from jaxembed.hub.torch_model import load_sentence_transformer

ONNX_PACKAGES = ("torch", "onnx", "onnxruntime")
ONNX_FOLDER = "onnx"  # sentence-transformers, TEI and transformers.js look here
GRAPH_FILE, INT8_GRAPH_FILE = "model.onnx", "model_int8.onnx"


@dataclasses.dataclass(frozen=True)
class QuantizedQuality:
    """Comparison of the vectors of a quantized graph with those of the model, on the probe texts.

    Attributes:
        least_cosine: Smallest cosine of two vectors of the same text.
        mean_cosine: Mean of these cosines.
        ranking_agreement: Share of the triples of texts for which both agree which of two texts is closer to the third.
    """

    least_cosine: float
    mean_cosine: float
    ranking_agreement: float


@dataclasses.dataclass(frozen=True)
class OnnxReport:
    """Comparison of the graphs with the model.

    Attributes:
        parity: Comparison of the float32 graph.
        int8: Quality of the int8 graph; None without one.
    """

    parity: Parity
    int8: QuantizedQuality | None = None

    def summarize(self) -> dict[str, Any]:
        """Return the comparisons as commands print them."""
        int8 = {} if self.int8 is None else {"int8": dataclasses.asdict(self.int8)}
        return {**self.parity.summarize(), **int8}


def check_onnx_installed() -> None:
    """Check that the packages that write and run graphs are installed.

    Raises:
        UserError: One is missing.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: not installed ({', '.join(missing)}). Run pip install '.[eval,onnx]'.")


def write_onnx(
    embedder: Embedder, folder: Path, onnx_folder: Path, probes: Mapping[str, list[str]], vectors: np.ndarray, int8: bool
) -> OnnxReport:
    """Write the baked graph of a folder, and compare it with the model.

    Args:
        embedder: The model.
        folder: Its sentence-transformers folder in float32.
        onnx_folder: The new folder for the graphs.
        probes: Texts by prompt.
        vectors: The model's vectors [N, D] of the probes.
        int8: Also write a graph with int8 weights.

    Raises:
        UserError: PyTorch cannot write the graph, or the vectors of the float32 graph differ.
    """
    from jaxembed.formats.baked_graph import quantize_graph, write_graph

    path = onnx_folder / GRAPH_FILE
    model = load_sentence_transformer(folder)
    try:
        write_graph(model, PROBE_TEXTS[:2], path)
    except RuntimeError as error:  # of the exporter, for unsupported operations
        raise UserError(
            f"--onnx: torch cannot write the graph of {embedder.model.transformer.family} ({summarize(error)}). "
            "Export without --onnx."
        ) from None
    session = open_session(path)
    # A graph sees no prompt. Where instruction tokens are left out, only texts without a prompt have the model's vectors.
    served_model = ServedModel(embedder.spec, embedder.model.transformer)
    plain_probes = {"": PROBE_TEXTS} if served_model.leaves_out_instructions else probes
    plain_vectors = vectors if plain_probes is probes else encode_probes(embedder, plain_probes)
    onnx_vectors = encode_probes_onnx(session, model.tokenizer, embedder, plain_probes)
    sides = len(list_padding_sides(embedder.model.transformer))
    parity = compare_vectors(np.tile(plain_vectors, (sides, 1)), onnx_vectors, FLOAT32_TOLERANCE)
    check_graph(parity, "sentence_embedding")
    # sentence-transformers reads the token vectors, and pools them itself.
    token_parity = compare_vectors(
        np.tile(vectors, (sides, 1)), _encode_with_graph(model, session, embedder, probes), FLOAT32_TOLERANCE
    )
    check_graph(token_parity, "last_hidden_state")
    if not int8:
        return OnnxReport(parity)
    quantize_graph(path, onnx_folder / INT8_GRAPH_FILE)
    quantized = encode_probes_onnx(open_session(onnx_folder / INT8_GRAPH_FILE), model.tokenizer, embedder, plain_probes)
    return OnnxReport(parity, measure_quality(plain_vectors, quantized[: len(plain_vectors)]))


def check_graph(parity: Parity, output: str) -> None:
    """Check a comparison of an output of the graph.

    Raises:
        UserError: The vectors differ.
    """
    if not parity.passes:
        raise UserError(
            f"--onnx: nothing written, because in the output {output} of the graph {parity}. Export without --onnx, or with "
            "another version of torch."
        )


def open_session(path: Path) -> Any:
    """Open a graph in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # only errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads sleep
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def encode_probes_onnx(session: Any, tokenizer: Any, embedder: Embedder, probes: Mapping[str, list[str]]) -> np.ndarray:
    """Encode the probes with only the graph, with padding on each side that the model allows.

    Args:
        session: The graph.
        tokenizer: Tokenizer of the exported folder.
        embedder: The model. Its suffix is appended to texts with a prompt, as users must do.
        probes: Texts by prompt.

    Returns:
        Unit vectors [sides * N, D].
    """
    vectors = []
    for side in list_padding_sides(embedder.model.transformer):
        tokenizer.padding_side = side
        for prompt, texts in probes.items():
            inputs = [prompt + text + embedder.spec.get_suffix(prompt) for text in texts]
            features = tokenizer(inputs, padding=True, truncation=True, return_tensors="np")
            feed = {name: features[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
            (batch,) = session.run(["sentence_embedding"], feed)
            vectors.append(batch / np.linalg.norm(batch, axis=1, keepdims=True))
    return np.concatenate(vectors)


def _encode_with_graph(model: Any, session: Any, embedder: Embedder, probes: Mapping[str, list[str]]) -> np.ndarray:
    """Encode the probes with sentence-transformers, on token vectors of the graph. The transformer of `model` is replaced."""
    from jaxembed.formats.baked_graph import GraphTransformer

    model[0].model = GraphTransformer(session, model[0].auto_model.config)
    return encode_probes_with(model, embedder.spec, probes, list_padding_sides(embedder.model.transformer))


def measure_quality(vectors: np.ndarray, quantized: np.ndarray) -> QuantizedQuality:
    """Compare unit vectors [N, D] of a quantized graph with the model's."""
    cosines = np.sum(vectors * quantized, axis=1)
    return QuantizedQuality(float(cosines.min()), float(cosines.mean()), measure_ranking_agreement(vectors, quantized))


def measure_ranking_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of text triples for which two sets of unit vectors [N, D] agree which text is closer to the third.

    This is the mean over the texts of (1 + Kendall's tau) / 2. Pairs that `a` ranks equally do not count.
    """
    num_agreeing = num_counted = 0
    for similarities_a, similarities_b in zip(a @ a.T, b @ b.T, strict=True):
        order_a = np.sign(similarities_a[:, None] - similarities_a)
        order_b = np.sign(similarities_b[:, None] - similarities_b)
        num_counted += int(np.count_nonzero(order_a))
        num_agreeing += int(np.count_nonzero((order_a == order_b) & (order_a != 0)))
    return num_agreeing / num_counted if num_counted else 1.0
