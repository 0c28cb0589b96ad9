"""Poolings compared with constants, sentence-transformers and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from sentence_transformers.sentence_transformer import modules

from helpers.loading import draw_texts, encode_packed, load_model, pack_texts
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.formats.sentence_transformers import POOLING_MODES
from jaxembed.formats.token_pooling import TokenPooling
from jaxembed.formats.weights import save_params
from jaxembed.model.embedder import infer_parameter_shapes
from jaxembed.model.masks import TokenInfo
from jaxembed.model.pooling import TRAINABLE_POOLINGS, LatentAttentionPooling, make_pooling

Folder = Callable[[str], Path]
HIDDEN = jnp.array([[[1.0, 2.0], [3.0, 5.0], [10.0, 20.0], [7.0, 7.0]]])
SEGMENT_MASK = jnp.array([[[True, False, False], [True, False, False], [False, True, False], [False, False, False]]])
TOKEN_INFO = TokenInfo(jnp.array([[1, 1, 2, 0]]), jnp.array([[1, 2, 0, 0]]), jnp.array([[True, True, True, False]]))


@pytest.mark.parametrize(
    ("pooling", "first_text"),
    [
        ("mean", [2.0, 3.5]),
        ("last", [3.0, 5.0]),
        ("first", [1.0, 2.0]),
        ("max", [3.0, 5.0]),
        ("weighted_mean", [(2 * 1 + 3 * 3) / 5, (2 * 2 + 3 * 5) / 5]),
    ],
)
def test_poolings_equal_constants(pooling: str, first_text: list[float]) -> None:
    out = make_pooling(pooling, 0, 0).apply({}, HIDDEN, SEGMENT_MASK, TOKEN_INFO)
    np.testing.assert_allclose(out, [[first_text, [10.0, 20.0], [0.0, 0.0]]], rtol=1e-6)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_poolings_agree_with_sentence_transformers(pooling: str, include_prompt: bool) -> None:
    if pooling == "first" and not include_prompt:
        pytest.skip("sentence-transformers pools the first token of the prompt")
    random = np.random.default_rng(0)
    hidden = random.normal(size=(3, 9, 8)).astype(np.float32)
    lengths, prompt = np.array([9, 6, 4]), 3
    seen = np.arange(9) < lengths[:, None]
    stock = modules.Pooling(8, POOLING_MODES[pooling], include_prompt=include_prompt)
    expected = stock({"token_embeddings": torch.tensor(hidden), "attention_mask": torch.tensor(seen), "prompt_length": prompt})
    pooled = seen if include_prompt else seen & (np.arange(9) >= prompt)
    token_info = TokenInfo(seen.astype(np.int32), np.tile(np.arange(9), (3, 1)), pooled)
    actual = jax.jit(make_pooling(pooling, 0, 0).apply)({}, *jax.device_put((hidden, pooled[..., None], token_info)))
    np.testing.assert_allclose(actual[:, 0], expected["sentence_embedding"].numpy(), atol=1e-6)


def randomize(params: Any, seed: int = 0) -> Any:
    """Replace parameters by random values, because some are zero before training and would hide errors."""
    random, flat = np.random.default_rng(seed), flatten_dict(params)
    return unflatten_dict({path: jnp.asarray(random.normal(0, 0.3, x.shape), jnp.float32) for path, x in flat.items()})


LENGTHS = np.array([7, 9, 4])


@pytest.mark.parametrize("pooling", TRAINABLE_POOLINGS)
def test_trainable_poolings_agree_with_pytorch(pooling: str, tmp_path: Path) -> None:
    hidden = np.random.default_rng(1).normal(size=(3, 9, 16)).astype(np.float32)
    seen = np.arange(9) < LENGTHS[:, None]
    token_info = TokenInfo(seen.astype(np.int32), np.tile(np.arange(9), (3, 1)), seen)
    module = make_pooling(pooling, 5, 4)
    inputs = jax.device_put((hidden, seen[..., None], token_info))
    params = randomize(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]))
    save_params(tmp_path / "model.safetensors", {"pooling": params}, {"pooling": ""}, lambda x: x)
    twin = TokenPooling(16, pooling, 5, 4)
    TokenPooling.load_torch_weights(str(tmp_path), model=twin)
    features = {"token_embeddings": torch.tensor(hidden), "attention_mask": torch.tensor(seen).long()}
    with torch.no_grad():
        tokens = twin(features)["token_embeddings"].numpy()
    expected = (tokens * seen[..., None]).sum(1) / seen.sum(1)[:, None]
    actual = np.asarray(jax.jit(module.apply)({"params": params}, *inputs))[:, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(actual) - (hidden * seen[..., None]).sum(1) / seen.sum(1)[:, None]).max() > 0.1


def test_latent_attention_agrees_with_the_release_of_nv_embed() -> None:
    """Compare with the release, rewritten in PyTorch: 2 heads as wide as the model, and a GEGLU of four times the width."""
    width, heads, latents = 6, 2, 3
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    x, array = draw(5, width), draw(latents, width)
    norms = {name: (draw(width), draw(width)) for name in ("attention_norm", "latent_norm", "mlp_norm")}
    to_q, to_kv, to_out = draw(heads * width, width), draw(2 * heads * width, width), draw(width, heads * width)
    to_hidden, to_width = (draw(8 * width, width), draw(8 * width)), (draw(width, 4 * width), draw(width))

    def normed(y: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(y, (width,), *norms[name], eps=1e-5)

    keys, values = (normed(array, "latent_norm") @ to_kv.T).split(heads * width, dim=-1)
    queries = normed(x, "attention_norm") @ to_q.T
    mixed = []
    for h in range(heads):
        head = slice(h * width, (h + 1) * width)
        weights = torch.softmax(queries[:, head] @ keys[:, head].T / width**0.5, dim=-1)
        mixed.append(weights @ values[:, head])
    y = x + torch.cat(mixed, dim=-1) @ to_out.T
    value, gate = (normed(y, "mlp_norm") @ to_hidden[0].T + to_hidden[1]).split(4 * width, dim=-1)
    exact_gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    expected = (y + (value * exact_gelu) @ to_width[0].T + to_width[1]).mean(dim=0)

    def kernel(weight: torch.Tensor) -> dict[str, Any]:
        return {"kernel": weight.numpy().T}

    params = {
        "latents": array.numpy(),
        **{name: {"scale": scale.numpy(), "bias": bias.numpy()} for name, (scale, bias) in norms.items()},
        "attention": {"q": kernel(to_q), "kv": kernel(to_kv), "out": kernel(to_out)},
        "mlp": {
            "in": kernel(to_hidden[0]) | {"bias": to_hidden[1].numpy()},
            "out": kernel(to_width[0]) | {"bias": to_width[1].numpy()},
        },
    }
    token_info = TokenInfo(jnp.ones((1, 5), int), jnp.arange(5)[None], jnp.ones((1, 5), bool))
    inputs = jax.device_put((x.numpy()[None], np.ones((1, 5, 1), bool), token_info))
    actual = jax.jit(LatentAttentionPooling(latents, heads).apply)({"params": jax.device_put(params)}, *inputs)
    np.testing.assert_allclose(actual[0, 0], expected, rtol=1e-4, atol=1e-4)


def test_paper_form_equals_equation_1() -> None:
    """With one head and an MLP that is the identity on positive numbers, the output is softmax(Q K^T) V."""
    hidden, latents = jnp.array([[[1.0, 0.0], [0.0, 3.0]]]), np.array([[2.0, 1.0], [1.0, 4.0]])
    wide, narrow = np.zeros((2, 8)), np.zeros((8, 2))
    wide[0, 0] = wide[1, 1] = 1e3  # gelu(x) is x for large x
    narrow[0, 0] = narrow[1, 1] = 1e-3
    params = {
        "latents": latents,
        "mlp_in": {"kernel": wide, "bias": np.zeros(8)},
        "mlp_out": {"kernel": narrow, "bias": np.zeros(2)},
    }
    token_info = TokenInfo(jnp.ones((1, 2), int), jnp.arange(2)[None], jnp.ones((1, 2), bool))
    module = LatentAttentionPooling(2, 1, paper=True)
    apply = jax.jit(partial(module.apply, mutable=["intermediates"]))
    out, sown = apply({"params": jax.device_put(params)}, hidden, jnp.ones((1, 2, 1), bool), token_info)
    scores = np.array([[2.0, 1.0], [3.0, 12.0]])
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[0, 0], (weights @ latents).mean(axis=0), rtol=1e-5)
    (latent_weights,) = sown["intermediates"]["latent_weights"]
    np.testing.assert_allclose(latent_weights[0, 0, 0], weights.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("pooling", ["latent_attention", "self_attention"])
def test_trainable_poolings_start_as_the_mean(base_folder: Folder, pooling: str) -> None:
    packed = pack_texts(draw_texts((5, 9, 3)), 16)
    mean = encode_packed(*load_model(base_folder("qwen2"), EmbeddingSpec()), *packed)
    fresh = encode_packed(*load_model(base_folder("qwen2"), EmbeddingSpec(pooling=pooling, latents=4)), *packed)
    np.testing.assert_allclose(fresh, mean, atol=1e-6)


def test_heads_that_do_not_divide_the_width_are_an_error(base_folder: Folder) -> None:
    with pytest.raises(
        UserError, match=r"model.pooling.heads: self_attention cannot split the model's width 32 into heads \(found 5;"
    ):
        load_model(base_folder("qwen2"), EmbeddingSpec(pooling="self_attention", pooling_heads=5))
    model, _ = load_model(base_folder("qwen2"), EmbeddingSpec(pooling="latent_attention", pooling_heads=5, latents=2))
    assert "pooling" in infer_parameter_shapes(model)
