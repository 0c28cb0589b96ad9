"""The linear layer after pooling: trained, saved, exported as a stock Dense module and loaded from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import tiny
from helpers.loading import load_model
from helpers.runs import make_config, write_base_and_data
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import SPEC_FILE
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

Folder = Callable[[str], Path]
DENSE = {"in_features": 32, "out_features": 6, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}


def load_projected(folder: Path, **choices: Any) -> Embedder:
    """Load a tiny model with a random projection to 6 dimensions."""
    spec = EmbeddingSpec(max_length=64, projection=6, **choices)
    model, params = load_model(folder, spec)
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), params["projection"])
    base = find_base(str(folder))
    tokenizer = build_text_tokenizer(base.tokenizer(), spec, base)
    return Embedder(model, {**params, "projection": drawn}, tokenizer, make_mesh(1), base.hf_config)


def test_export_as_a_dense_module_loads_again(base_folder: Folder, tmp_path: Path) -> None:
    choices = {"projection_bias": True, "projection_activation": "tanh", "normalize": False}
    model, out = load_projected(base_folder("qwen3"), **choices), tmp_path / "out"
    # This compares the float32 folder too.
    parity = export(model, out, "bfloat16", Card("projected", "base")).parity
    assert 0 < parity.error <= parity.allowed < 0.1
    assert "projected to 6 dimensions" in (out / "README.md").read_text()
    (out / SPEC_FILE).unlink()  # so that the folder is read as one that sentence-transformers wrote
    again = Embedder.load(out)
    for name, value in ({"projection": 6} | choices).items():
        assert getattr(again.spec, name) == value
    ours = again.encode(tiny.TEXTS)
    assert ours.shape == (len(tiny.TEXTS), 6)
    assert np.abs(ours[0] - ours[1]).max() > 1e-2
    np.testing.assert_allclose(encode_torch(load_sentence_transformer(out).float(), tiny.TEXTS, ""), ours, atol=1e-5)
    narrow = ours[:, :3] / np.linalg.norm(ours[:, :3], axis=1, keepdims=True)
    np.testing.assert_allclose(again.encode(tiny.TEXTS, dim=3), narrow, atol=1e-6)
    with pytest.raises(UserError, match=r"dim: 7 is out of range \(vectors of this model have 6 dimensions\)"):
        again.encode(["x"], dim=7)


def test_a_run_with_adapters_trains_the_projection(tmp_path: Path) -> None:
    folder = write_base_and_data(tmp_path)
    chosen = ["model.projection={width: 6, bias: true}", "model.lora={rank: 2, alpha: 4}", "optim.learning_rate=0.05"]
    train(make_config(folder, "run", *chosen, "optim.warmup_steps=0", "eval.sets=[]", "train.steps=1", "mesh.data=1"))
    trained = Embedder.load(folder / "run")
    before = load_model(folder / "base", trained.spec)[1]["projection"]
    for key, start in before.items():
        assert np.abs(np.asarray(trained.params["projection"][key]) - np.asarray(start)).max() > 0.01
    assert trained.encode([]).shape == (0, 6)


def test_a_base_without_weights_of_its_projection_is_an_error(base_folder: Folder) -> None:
    with pytest.raises(UserError, match=r"has no weights for its projection\. Train it"):
        load_embedder(find_base(str(base_folder("qwen3"))), EmbeddingSpec(projection=6), ComputeOptions(), make_mesh(1))


def write_modules(folder: Path, base: Path, kinds: list[str], dense: dict[str, Any]) -> Path:
    """Write a sentence-transformers folder of these modules, without their weights."""
    folder.mkdir()
    for file in base.glob("*.json"):
        (folder / file.name).symlink_to(file)
    modules = [
        {"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for module, kind in zip(modules, kinds, strict=True):
        if kind != "Transformer":
            (folder / module["path"]).mkdir()
            config = dense if kind == "Dense" else {"pooling_mode": "mean"}
            (folder / module["path"] / "config.json").write_text(json.dumps(config))
    return folder


def test_a_dense_module_sets_the_spec(base_folder: Folder, tmp_path: Path) -> None:
    spec = find_base(str(write_modules(tmp_path / "model", base_folder("qwen3"), MODULES, DENSE | {"bias": False}))).spec
    assert (spec.projection, spec.projection_bias, spec.projection_activation, spec.normalize) == (6, False, "identity", True)


MODULES = ["Transformer", "Pooling", "Dense", "Normalize"]


@pytest.mark.parametrize(
    ("kinds", "changes", "message"),
    [
        (
            MODULES,
            {"activation_function": "torch.nn.modules.activation.GELU"},
            "GELU is not supported .expected Identity or Tanh of torch.nn",
        ),
        (MODULES, {"activation_function": "mine.Tanh"}, "mine.Tanh is not supported"),
        (MODULES, {"in_features": 64}, "in_features is 64 .expected 32, the width of the vectors before it"),
        (MODULES, {"use_residual": True}, "without use_residual"),
        (MODULES, {"module_input_name": "token_embeddings"}, "expected input and output sentence_embedding"),
        (["Transformer", "Pooling", "Dense", "Dense"], {}, "in_features is 32 .expected 6, the width of the vectors before it"),
        (["Transformer", "Dense", "Pooling"], {}, "found Transformer, Dense, Pooling"),
    ],
)
def test_unsupported_modules_are_errors(
    base_folder: Folder, tmp_path: Path, kinds: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_base(str(write_modules(tmp_path / "model", base_folder("qwen3"), kinds, DENSE | changes)))


def test_weights_without_safetensors_are_an_error(base_folder: Folder, tmp_path: Path) -> None:
    folder = write_modules(tmp_path / "model", base_folder("qwen3"), MODULES, DENSE)
    (folder / "model.safetensors").symlink_to(base_folder("qwen3") / "model.safetensors")
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"2_Dense/model.safetensors: no such file .expected .*projection"):
        Embedder.load(folder)
