"""The linear layer after the pooling: trained, kept, exported as a stock Dense module, read from one."""

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
from helpers.loading import load
from helpers.runs import prepare, settings
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub.base import SPEC_FILE, find_base
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import from_base
from jaxembed.hub.export import encode_torch, export, load_sentence_transformer
from jaxembed.hub.restore import text_tokenizer
from jaxembed.model.decoder import Compute
from jaxembed.runs.train import train

Folder = Callable[[str], Path]
DENSE = {"in_features": 32, "out_features": 6, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}


def projected(folder: Path, **choices: Any) -> Embedder:
    """A tiny model with a random projection to 6 numbers."""
    spec = EmbeddingSpec(max_length=64, projection=6, **choices)
    model, params = load(folder, spec)
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), params["projection"])
    base = find_base(str(folder))
    tokenizer = text_tokenizer(base.tokenizer(), spec, base)
    return Embedder(model, {**params, "projection": drawn}, tokenizer, make_mesh(1), base)


def test_it_goes_out_as_a_stock_module_and_comes_back(base_folder: Folder, tmp_path: Path) -> None:
    choices = {"projection_bias": True, "projection_activation": "tanh", "normalize": False}
    model, out = projected(base_folder("qwen3"), **choices), tmp_path / "out"
    parity = export(model, out, "bfloat16", Card("projected", "base"))  # which compares the float32 folder too
    assert 0 < parity.error <= parity.allowed < 0.1
    assert "projected to 6 numbers" in (out / "README.md").read_text()
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
    with pytest.raises(UserError, match="dim is 7; expected 1 to 6"):
        again.encode(["x"], dim=7)


def test_a_run_of_adapters_trains_it(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    chosen = ["model.projection={width: 6, bias: true}", "model.lora={rank: 2, alpha: 4}", "optim.learning_rate=0.05"]
    train(settings(folder, "run", *chosen, "optim.warmup_steps=0", "eval.sets=[]", "train.steps=1", "mesh.data=1"))
    trained = Embedder.load(folder / "run")
    before = load(folder / "base", trained.spec)[1]["projection"]
    for key, start in before.items():
        assert np.abs(np.asarray(trained.params["projection"][key]) - np.asarray(start)).max() > 0.01
    assert trained.encode([]).shape == (0, 6)


def test_without_its_weights_a_base_is_not_a_model(base_folder: Folder) -> None:
    with pytest.raises(UserError, match="has no weights of its projection; train it"):
        from_base(find_base(str(base_folder("qwen3"))), EmbeddingSpec(projection=6), Compute(), make_mesh(1))


def listed(folder: Path, base: Path, kinds: list[str], dense: dict[str, Any]) -> Path:
    """A sentence-transformers folder of these modules, without weights of any of them."""
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


def test_a_dense_module_is_read_as_the_spec_says(base_folder: Folder, tmp_path: Path) -> None:
    spec = find_base(str(listed(tmp_path / "made", base_folder("qwen3"), CHAIN, DENSE | {"bias": False}))).spec
    assert (spec.projection, spec.projection_bias, spec.projection_activation, spec.normalize) == (6, False, "identity", True)


CHAIN = ["Transformer", "Pooling", "Dense", "Normalize"]


@pytest.mark.parametrize(
    ("kinds", "changes", "told"),
    [
        (CHAIN, {"activation_function": "torch.nn.modules.activation.GELU"}, "GELU is not supported .expected torch.nn's Id"),
        (CHAIN, {"activation_function": "mine.Tanh"}, "mine.Tanh is not supported"),
        (CHAIN, {"in_features": 64}, "in_features is 64 .expected 32, the width of the model"),
        (CHAIN, {"use_residual": True}, "without use_residual"),
        (CHAIN, {"module_input_name": "token_embeddings"}, "expected input and output sentence_embedding"),
        (["Transformer", "Pooling", "Dense", "Dense"], {}, "found Transformer, Pooling, Dense, Dense"),
        (["Transformer", "Dense", "Pooling"], {}, "found Transformer, Dense, Pooling"),
    ],
)
def test_what_goes_beyond_it_is_refused(
    base_folder: Folder, tmp_path: Path, kinds: list[str], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        find_base(str(listed(tmp_path / "made", base_folder("qwen3"), kinds, DENSE | changes)))


def test_weights_that_are_no_safetensors_are_named(base_folder: Folder, tmp_path: Path) -> None:
    made = listed(tmp_path / "made", base_folder("qwen3"), CHAIN, DENSE)
    (made / "model.safetensors").symlink_to(base_folder("qwen3") / "model.safetensors")
    (made / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"2_Dense/model.safetensors: no such file .expected .*projection"):
        Embedder.load(made)
