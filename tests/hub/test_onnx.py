"""ONNX graphs contain the whole model: plain ONNX Runtime and sentence-transformers get its vectors from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from helpers import tiny
from helpers.loading import load_model
from jaxembed import Embedder
from jaxembed import export as command
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.formats import baked_graph
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.onnx_export import (
    INT8_GRAPH_FILE,
    ONNX_FOLDER,
    check_onnx_installed,
    measure_ranking_agreement,
    open_session,
    write_onnx,
)
from jaxembed.hub.parity import encode_probes, select_probes
from jaxembed.hub.resolve import find_base
from jaxembed.hub.stock_folder import write_stock_folder
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer

pytestmark = pytest.mark.usefixtures("one_device")

PROMPT = "Instruct: Find the answer\nQuery:"
TEXTS = [*tiny.TEXTS, "one more " * 60]
LATENT = {"pooling": "latent_attention", "latents": 6, "pooling_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bidirectional mean": ("qwen3", {"prompts": {"query": PROMPT}}),
    "causal last with windows": ("qwen2-mixed", {"attention": "causal", "pooling": "last"}),
    "without instruction": ("mistral-window", {"attention": "causal", "include_instruction": False, "plain_prompt": PROMPT}),
    "latent attention": ("llama", LATENT),
    "projection": ("qwen2", {"projection": 6, "projection_bias": True, "normalize": False}),
    "learned positions after the padding token": ("xlm-roberta", {"pooling": "first"}),
    "causal windows of Gemma": ("gemma3_text", {"attention": "causal", "pooling": "last"}),
    "halved windows of Gemma": ("gemma3_text", {"projection": 6, "hidden_projections": ({"width": 8},)}),
}


def load_with_random_parts(base: Path, **choices: Any) -> Embedder:
    """Load a base with a random pooling and projection, none of whose parameters is zero."""
    spec, found = EmbeddingSpec(max_length=64, **choices), find_base(str(base))
    model, params = load_model(base, spec)
    random = np.random.default_rng(0)
    drawn = {
        part: jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), tree)
        for part, tree in params.items()
        if part != "decoder"
    }
    tokenizer = build_text_tokenizer(found.tokenizer(), spec, found)
    return Embedder(model, {**params, **drawn}, tokenizer, make_mesh(1), found.hf_config)


def add_graphs(model: Embedder, folder: Path, int8: bool = False) -> Any:
    """Write a model's folder with graphs, as export does."""
    write_stock_folder(model, folder, "float32")
    probes = select_probes(model)
    return write_onnx(model, folder, folder / ONNX_FOLDER, probes, encode_probes(model, probes), int8)


def run_graph(folder: Path, texts: list[str], side: str, file: str = "model.onnx") -> np.ndarray:
    """Run a graph in plain ONNX Runtime, and return unit vectors [N, D]."""
    tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / ONNX_FOLDER / file, providers=["CPUExecutionProvider"])
    (vectors,) = session.run(["sentence_embedding"], {name: tokens[name] for name in ("input_ids", "attention_mask")})
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("name", MODELS)
def test_graph_gives_the_vectors_of_the_model(base_folder: Any, tmp_path: Path, name: str) -> None:
    family, choices = MODELS[name]
    model, out = load_with_random_parts(base_folder(family), **choices), tmp_path / "out"
    report = add_graphs(model, out)
    assert report.parity.error < 1e-5
    # ONNX Runtime alone, with other batch sizes and lengths than those of the traced texts.
    expected = model.encode(TEXTS, prompt="")
    assert np.abs(expected[0] - expected[1]).max() > 1e-2, "the vectors of different texts must differ"
    for side in ("right", "left"):
        np.testing.assert_allclose(run_graph(out, TEXTS, side), expected, atol=1e-5)
    np.testing.assert_allclose(run_graph(out, TEXTS[-1:], "right"), expected[-1:], atol=1e-5)
    # sentence-transformers' ONNX backend takes the token vectors, and leaves out the instruction where the model does.
    stock_model = load_sentence_transformer(out)
    in_torch = encode_torch(stock_model, TEXTS, PROMPT)
    stock_model[0].model = baked_graph.GraphTransformer(open_session(out / ONNX_FOLDER / "model.onnx"), stock_model[0].config)
    on_graph = encode_torch(stock_model, TEXTS, PROMPT)
    np.testing.assert_allclose(on_graph, in_torch, atol=1e-5)
    np.testing.assert_allclose(on_graph, model.encode(TEXTS, prompt=PROMPT), atol=1e-5)


def test_export_of_a_bfloat16_folder_adds_float32_and_int8_graphs(base_folder: Any, tmp_path: Path) -> None:
    model, out = load_with_random_parts(base_folder("qwen3")), tmp_path / "out"
    report = export(model, out, "bfloat16", Card("test", "base"), "int8")
    assert report.onnx is not None and report.onnx.int8 is not None
    assert report.onnx.parity.error < 1e-5 < report.parity.error  # weights that are not rounded
    np.testing.assert_allclose(run_graph(out, TEXTS, "right"), model.encode(TEXTS), atol=1e-5)
    graph = onnxruntime.InferenceSession(out / ONNX_FOLDER / "model.onnx", providers=["CPUExecutionProvider"])
    batch = ["batch_size", "sequence_length"]
    assert [(x.name, x.shape, x.type) for x in graph.get_inputs()] == [
        (name, batch, "tensor(int64)") for name in ("input_ids", "attention_mask")
    ]
    assert [(x.name, x.shape) for x in graph.get_outputs()] == [
        ("last_hidden_state", [*batch, 32]), ("sentence_embedding", ["batch_size", 32]),
    ]  # fmt: skip
    # The int8 graph differs, and its quality is stated.
    int8 = report.onnx.int8
    quantized = run_graph(out, TEXTS, "right", INT8_GRAPH_FILE)
    assert 1e-4 < 1 - np.sum(quantized * model.encode(TEXTS), axis=1).min() < 0.5
    assert 0.5 < int8.least_cosine < int8.mean_cosine < 1
    assert 0.5 < int8.ranking_agreement <= 1
    card = (out / "README.md").read_text()
    assert f"has int8 weights: cosine at least {int8.least_cosine:.4f}" in card
    assert "needs a graph" not in card
    assert report.summarize()["onnx"]["int8"]["least_cosine"] == int8.least_cosine


def test_large_weights_are_stored_next_to_the_graph(base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baked_graph, "MAX_INLINE_BYTES", 1000)
    model, out = load_with_random_parts(base_folder("qwen2")), tmp_path / "out"
    report = add_graphs(model, out, int8=True)
    files = {path.name: path.stat().st_size for path in (out / ONNX_FOLDER).iterdir()}
    assert files.keys() >= {"model.onnx", "model.onnx_data", INT8_GRAPH_FILE}
    assert files["model.onnx_data"] > 100_000
    assert report.parity.error < 1e-5


def test_a_graph_with_another_mask_is_refused(base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph = baked_graph.write_graph

    def write_causal_graph(model: Any, *args: Any) -> None:
        model[0].auto_model.config.is_causal = True
        write_graph(model, *args)

    monkeypatch.setattr(baked_graph, "write_graph", write_causal_graph)
    with pytest.raises(
        UserError, match=r"^--onnx: nothing written, because in the output sentence_embedding of the graph the ex"
    ):
        add_graphs(load_with_random_parts(base_folder("qwen3")), tmp_path / "out")


def test_a_model_that_cannot_be_traced_is_named(base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(*args: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(baked_graph, "build_gemma_masks", raise_error)
    with pytest.raises(
        UserError, match=r"--onnx: torch cannot write the graph of gemma3_text \(no such operator\)\. Export without --onnx\."
    ):
        add_graphs(load_with_random_parts(base_folder("gemma3_text")), tmp_path / "out")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.raises(UserError, match=r"^--onnx: not installed \(onnxruntime\)\. Run pip install '\.\[eval,onnx\]'\.$"):
        check_onnx_installed()


@pytest.mark.parametrize("other", [["--adapters"], ["--layout", "nv-embed"]])
def test_other_layouts_have_no_graph(tmp_path: Path, other: list[str]) -> None:
    args = command.make_parser().parse_args(["no-such-model", str(tmp_path / "out"), "--onnx-int8", *other])
    with pytest.raises(UserError, match="--onnx: adds a graph to the sentence-transformers layout"):
        command.main(args)


def test_ranking_agreement_counts_pairs() -> None:
    a = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    assert measure_ranking_agreement(a, a) == 1
    # The neighbors of the second text swap: one of three pairs with itself left out, counted from every text.
    b = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert measure_ranking_agreement(a, b) == pytest.approx(8 / 9)
    assert measure_ranking_agreement(np.ones((3, 1)), np.ones((3, 1))) == 1
