"""Dropout in the transformer: off by default and in encoding, drawn from the key, in every kernel that has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from helpers.loading import draw_texts, load_model, pack_texts
from helpers.training_batches import SPEC
from jaxembed.config import DropoutConfig
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.model.masks import BIDIRECTIONAL, TokenInfo
from jaxembed.model.plain_attention import AttentionDropout, attend_einsum, attend_rows
from jaxembed.training.gradcache import encode

TEXT = draw_texts([12])[0]


def encode_twice(base: Path, dropout: DropoutConfig, key: int, devices: int = 1, **keys: Any) -> np.ndarray:
    """Return the vectors of one text that is in the batch twice for each of 8 shards: [8, 2, D]."""
    model, params = load_model(base, SPEC, devices, dropout=dropout, unroll=False, **keys)
    packed, slots = pack_texts([TEXT, TEXT], 32)
    slots = np.tile(slots[None], (8, 1)).astype(np.int32)
    packed = jax.tree.map(lambda x: np.tile(x, (8, 1)), packed.replace(shards=8))
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, {"texts": packed, "slots": slots})
        run = jax.jit(lambda params, batch, key: encode(model, params, batch["texts"], batch["slots"], key, None))
        return np.asarray(run(params, batch, jax.random.key(key)))


@pytest.mark.parametrize("dropout", [DropoutConfig(hidden=0.2), DropoutConfig(attention=0.2)])
def test_two_copies_of_a_text_differ_and_a_key_repeats_them(base_folder: Callable[[str], Path], dropout: DropoutConfig) -> None:
    base = base_folder("qwen2")
    first, again, other = (encode_twice(base, dropout, key) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    cosines = np.sum(first[:, 0] * first[:, 1], axis=-1)
    assert (cosines > 0.2).all() and (cosines < 0.9999).all()
    assert np.abs(first - other).max() > 1e-3
    # On eight devices the key draws the same dropout.
    np.testing.assert_allclose(encode_twice(base, dropout, 0, devices=8), first, atol=1e-5)


def test_without_dropout_two_copies_are_equal(base_folder: Callable[[str], Path]) -> None:
    vectors = encode_twice(base_folder("qwen2"), DropoutConfig(), 0)
    np.testing.assert_allclose(vectors, np.broadcast_to(vectors[:1, :1], vectors.shape), atol=1e-6)


def test_hidden_dropout_is_where_bert_has_it(base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the embeddings, and of the output of every block. A fixed mask over the dimensions takes the place of random ones."""
    mask, base = np.tile([0.0, 2.0], 16).astype(np.float32), base_folder("bert")
    monkeypatch.setattr("jaxembed.model.transformer.make_dropout", lambda module, rate: lambda x: x * mask)
    model, params = load_model(base, SPEC)
    packed, index = pack_texts([TEXT], 32)
    vector = np.asarray(jax.jit(model.apply)({"params": params}, packed)).reshape(-1, 32)[index[0]]
    stock = transformers.AutoModel.from_pretrained(base).eval()
    for name, module in stock.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.endswith("self.dropout"):  # that of attention weights
            module.register_forward_hook(lambda module, inputs, output: output * torch.tensor(mask))
    with torch.no_grad():
        expected = stock(torch.tensor(TEXT).long()[None]).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(vector, torch.nn.functional.normalize(expected, dim=0), atol=1e-5)


def test_encoding_has_no_dropout(base_folder: Callable[[str], Path]) -> None:
    packed, _ = pack_texts([TEXT], 32)
    with_dropout, params = load_model(base_folder("qwen2"), SPEC, dropout=DropoutConfig(hidden=0.5, attention=0.5))
    plain, _ = load_model(base_folder("qwen2"), SPEC)
    np.testing.assert_array_equal(*(model.apply({"params": params}, packed) for model in (with_dropout, plain)))


@pytest.mark.parametrize("shards", [0, 2])
def test_dropped_attention_keeps_its_mean(shards: int) -> None:
    """Over many rows, the mean of the outputs is that without dropout; a rate of a half doubles the weights that stay."""
    random, rows = np.random.default_rng(0), 600
    q, k, v = (jnp.tile(jnp.asarray(random.normal(size=(1, 4, 2, 8)), jnp.float32), (rows, 1, 1, 1)) for _ in range(3))
    info = TokenInfo(
        *(jnp.broadcast_to(x, (rows, 4)) for x in (jnp.ones((1, 4), int), jnp.arange(4)[None], jnp.ones((1, 4), bool)))
    )
    exact = attend_einsum(q[:1], k[:1], v[:1], jax.tree.map(lambda x: x[:1], info), BIDIRECTIONAL, None)[0]
    dropout = AttentionDropout(0.5, jax.random.key(0))
    attend = attend_einsum if not shards else lambda *args: attend_rows(*args[:6], shards, args[6])
    dropped = np.asarray(attend(q, k, v, info, BIDIRECTIONAL, None, dropout))
    np.testing.assert_allclose(dropped.mean(axis=0), exact, atol=0.15)
    assert dropped.std(axis=0).min() > 0.1
