"""Low-rank adapters: their formula, which parameters are trained and saved, and that merging changes no vector."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from helpers import tiny
from helpers.adapters import load_adapted
from helpers.loading import draw_texts, encode_packed, load_model, pack_texts
from helpers.runs import make_config, read_losses, train_until_stopped, write_base_and_data
from jaxembed import Embedder
from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.model.layers import Linear
from jaxembed.model.lora import TARGET_PROJECTIONS, join_params, merge_adapters, split_params
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

Folder = Callable[[str], Path]
LORA_OVERRIDES = ["model.lora={rank: 4, alpha: 8}", "optim.learning_rate=0.01", "eval.sets=[]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("lora"))


def test_update_equals_the_formula() -> None:
    random = np.random.default_rng(0)
    x, w, a, b = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((5, 6), (6, 4), (6, 2), (2, 4)))
    linear = Linear(4, ("embed", "mlp"), jnp.float32, lora=LoraConfig(rank=2, alpha=3.0), name="up")
    out = linear.apply({"params": {"kernel": w, "lora_a": a, "lora_b": b}}, x)
    np.testing.assert_allclose(out, x @ w + 3 / 2 * x @ a @ b, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_merging_keeps_the_vectors(base_folder: Folder, family: str) -> None:
    lora = LoraConfig(rank=3, alpha=6.0)
    model, params = load_adapted(base_folder(family), lora)
    packed = pack_texts(draw_texts((5, 20, 9)), 32)
    plain, _ = load_model(base_folder(family), EmbeddingSpec(), unroll=False)
    unmerged = encode_packed(model, params, *packed)
    np.testing.assert_allclose(encode_packed(plain, merge_adapters(params, lora), *packed), unmerged, atol=1e-5)
    untouched = {path: x for path, x in flatten_dict(params).items() if "lora" not in path[-1]}
    assert np.abs(encode_packed(plain, unflatten_dict(untouched), *packed) - unmerged).max() > 1e-2


def test_adapter_shapes(base_folder: Folder) -> None:
    model, params = load_model(
        base_folder("qwen2"), EmbeddingSpec(), lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
    )
    shapes = {"/".join(path[2:]): x.shape for path, x in flatten_dict(params).items() if "lora" in path[-1]}
    assert shapes == {
        "attention/q/lora_a": (3, 32, 4), "attention/q/lora_b": (3, 4, 32),
        "mlp/down/lora_a": (3, 48, 4), "mlp/down/lora_b": (3, 4, 32),
    }  # fmt: skip
    everything, _ = load_model(base_folder("qwen2"), EmbeddingSpec(), lora=LoraConfig(rank=4, alpha=8.0))
    found = jax.eval_shape(everything.init, jax.random.key(0), pack_texts(draw_texts((5,)), 32)[0])["params"]
    assert sum("lora_a" in path for path in flatten_dict(found)) == len(TARGET_PROJECTIONS)
    assert model.lora is not None


def test_dropout_needs_a_dropout_key(base_folder: Folder) -> None:
    targets = ("q_proj", "down_proj")
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.5, targets=targets)
    model, params = load_adapted(base_folder("qwen2"), lora)
    packed, _ = pack_texts(draw_texts((5, 20)), 32)
    without, _ = load_adapted(base_folder("qwen2"), LoraConfig(rank=4, alpha=8.0, targets=targets))
    same = [jax.jit(one.apply)({"params": params}, packed) for one in (model, without)]
    assert np.array_equal(*same)
    apply = jax.jit(model.apply)

    def encode_with_dropout(seed: int) -> np.ndarray:
        return np.asarray(apply({"params": params}, packed, rngs={"dropout": jax.random.key(seed)}))

    assert np.array_equal(encode_with_dropout(0), encode_with_dropout(0))
    assert np.abs(encode_with_dropout(0) - encode_with_dropout(1)).max() > 1e-3


def test_split_and_join() -> None:
    params = {
        "decoder": {"embedding": 1, "up": {"kernel": 2, "lora_a": 3, "lora_b": 4}},
        "pooling": {"latents": 5, "out": {"kernel": 6}},
        "projection": {"kernel": 7},
    }
    trained, frozen = split_params(params)
    assert trained == {
        "decoder": {"up": {"lora_a": 3, "lora_b": 4}},
        "pooling": {"latents": 5, "out": {"kernel": 6}},
        "projection": {"kernel": 7},
    }
    assert frozen == {"decoder": {"embedding": 1, "up": {"kernel": 2}}}
    assert join_params(trained, frozen) == params
    plain = {"decoder": {"embedding": 1}}
    assert split_params(plain) == (plain, {})


def test_adapters_train_resume_and_export_merged(folder: Path, tmp_path: Path) -> None:
    """Use NV-Embed's adapters. A resumed run has the losses of an uninterrupted one. Checkpoints do not contain the base."""
    nv_embed = ["model.lora={rank: 16, alpha: 32, dropout: 0.1}", "model.pooling={kind: latent_attention, latents: 5}"]
    nv_embed.append("eval.sets=[]")
    whole = train(make_config(folder, "whole", *nv_embed, "train.steps=4"))
    half = make_config(folder, "half", *nv_embed, "train.steps=4")
    train_until_stopped(half, 2)
    assert len(read_losses(folder / "half")) == 2
    train(half)
    assert read_losses(folder / "half") == read_losses(folder / "whole")
    assert whole["step"] == 4

    model = Embedder.load(folder / "whole", checkpoint="last")
    assert model.model.lora is None
    assert np.abs(model.encode(tiny.TEXTS) - Embedder.load(folder / "base").encode(tiny.TEXTS)).max() > 1e-4
    export(model, tmp_path / "out", "float32", Card("lora", "base"))
    np.testing.assert_allclose(Embedder.load(tmp_path / "out").encode(tiny.TEXTS), model.encode(tiny.TEXTS), atol=1e-5)
    saved = folder / "whole" / "checkpoints" / "4" / "params"
    disk_bytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    trained, frozen = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in load_split_params(folder / "base"))
    assert disk_bytes < 0.6 * trained + 0.9 * frozen


def load_split_params(base: Path) -> tuple[Any, Any]:
    return split_params(
        load_model(base, EmbeddingSpec(pooling="latent_attention", latents=5), lora=LoraConfig(rank=16, alpha=32.0))[1]
    )


def test_adapters_need_the_base_they_were_trained_on(folder: Path, tmp_path: Path) -> None:
    tiny.write_folder(tmp_path / "base", "qwen3")
    config = make_config(folder, "moved", *LORA_OVERRIDES, "train.steps=1", f"model.base={tmp_path / 'base'}")
    train(config)
    other = tmp_path / "aside"
    (tmp_path / "base").rename(other)
    with pytest.raises(UserError, match=r"The run contains adapters only and needs its base\. Restore it"):
        Embedder.load(folder / "moved")
    tiny.write_folder(tmp_path / "base", "qwen3", seed=1)
    with pytest.raises(UserError, match="not the base that the run's adapters were trained on"):
        Embedder.load(folder / "moved")
    record = json.loads((folder / "moved" / "base.json").read_text())
    record["lora"]["targets"] = ["qq"]
    (folder / "moved" / "base.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"base\.json: lora: targets\.0 is .* \(expected 'q_proj'"):
        Embedder.load(folder / "moved")


def test_a_preset_cannot_have_adapters(folder: Path) -> None:
    with pytest.raises(UserError, match="preset:tiny has no weights to adapt"):
        train(make_config(folder, "preset", *LORA_OVERRIDES, "model.base=preset:tiny"))
