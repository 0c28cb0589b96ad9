"""Exports say in which dtypes a model may be served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.formats.rounded_arithmetic import round_layers
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.parity import PROBE_TEXTS
from jaxembed.hub.resolve import find_base
from jaxembed.hub.safe_dtypes import CODE_TEXTS, MAX_CHECKED_CHARS, DtypeQuality, list_unsafe_dtypes, measure_dtypes
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.transformer import ComputeOptions

pytestmark = pytest.mark.usefixtures("one_device")

SPEC = EmbeddingSpec(max_length=64)
FACTOR = 8000.0  # by which activations of one layer grow: beyond 65,504, the largest number of float16


@pytest.fixture(scope="module")
def folder(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a model whose second MLP has huge activations, and the vectors of an ordinary one."""
    base = tmp_path_factory.mktemp("huge") / "base"
    base.mkdir()
    for path in base_folder("qwen2").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if name.endswith("layers.1.mlp.up_proj.weight"):
            weights[name] = weights[name] * FACTOR
        if name.endswith("layers.1.mlp.down_proj.weight"):
            weights[name] = weights[name] / FACTOR
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def load(base: Path) -> Embedder:
    return load_embedder(find_base(str(base)), SPEC, ComputeOptions(), make_mesh(1))


def test_overflow_is_named_in_the_card_and_in_one_line(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    report = export(load(folder), out, "float32", Card("test", "base"))
    bfloat16, float16 = report.dtypes
    assert (bfloat16.dtype, bfloat16.is_safe, bfloat16.overflow) == ("bfloat16", True, "")
    assert (float16.dtype, float16.is_safe, float16.overflow) == ("float16", False, "layers.1.mlp.down_proj")
    assert report.summarize()["safe_dtypes"] == ["float32", "bfloat16"]
    finding = "overflow in layers.1.mlp.down_proj, vectors are NaN"
    assert [line for line in caplog.messages if "not safe" in line] == [
        f"{out}: float16 is not safe for this model ({finding}). Serve it in another dtype."
    ]
    assert f"| float16 | **no** | {finding} |" in (out / "README.md").read_text()
    # PyTorch's own float16 overflows too.
    texts = [text for text in [*PROBE_TEXTS, *CODE_TEXTS] if len(text) <= MAX_CHECKED_CHARS]
    half = encode_torch(load_sentence_transformer(out).half(), texts, "")
    assert np.isnan(half).any()


def test_rounded_layers_lose_as_much_as_the_dtype_itself(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(load(base_folder("qwen2")), out, "float32", Card("test", "base"))
    exact = encode_torch(load_sentence_transformer(out), CODE_TEXTS, "")
    model = load_sentence_transformer(out)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for dtype in (torch.bfloat16, torch.float16):
        with round_layers(model, dtype) as overflow:
            rounded = encode_torch(model, CODE_TEXTS, "")
        real = encode_torch(load_sentence_transformer(out).to(dtype), CODE_TEXTS, "")
        lost, lost_in_dtype = (1 - measure_cosine(exact, vectors) for vectors in (rounded, real))
        assert 0.2 * lost_in_dtype < lost < 5 * lost_in_dtype
        assert overflow.layer == ""
    # The hooks are gone, and the weights are as they were.
    np.testing.assert_array_equal(encode_torch(model, CODE_TEXTS, ""), exact)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(quality.is_safe for quality in measure_dtypes(out, SPEC))


def measure_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the least cosine of rows, in float64: vectors that were normalized in float16 are not of unit length."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def test_a_low_cosine_is_not_safe() -> None:
    close, far = DtypeQuality("bfloat16", 0.995), DtypeQuality("float16", 0.97)
    assert list_unsafe_dtypes([close, far]) == [
        "float16 is not safe for this model (smallest cosine 0.9700). Serve it in another dtype."
    ]
    assert DtypeQuality("float16", float("nan")).finding == "vectors are NaN"
