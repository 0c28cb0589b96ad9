"""The decoder against transformers in float32, layer by layer, on packed rows."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch

from helpers import tiny
from helpers.loading import draw_texts, in_rows, load, vectors
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.hub.base import find_base
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.families import PRESETS, from_hf, preset

LENGTHS = (3, 17, 30, 9, 1, 12)  # more than one window of the family that has one, and rows that several texts share
ROW = 32
Folder = Callable[[str], Path]


def texts() -> list[np.ndarray]:
    return draw_texts(LENGTHS)


def reference(family: str, causal: bool) -> list[list[np.ndarray]]:
    """By transformers, for each text alone: the output of every layer, then that of the final norm."""
    model = tiny.torch_model(family, causal=causal)
    layers: list[Any] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: layers.append(out[0] if isinstance(out, tuple) else out))
    states = []
    for text in texts():
        layers.clear()
        with torch.no_grad():
            final = model(torch.tensor(text[None].astype(np.int64))).last_hidden_state
        states.append([state[0].numpy() for state in (*layers, final)])
    return states


def hidden_states(model: EmbeddingModel, params: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Ours, for each text out of its row: the output of every layer [L, tokens, D]; and the vectors [texts, D]."""
    packed, index = in_rows(texts(), ROW)
    out, sown = jax.jit(lambda p: model.apply({"params": p}, packed, mutable=["intermediates"]))(params)
    (hidden,) = sown["intermediates"]["decoder"]["layers"]["hidden"]
    row, segment = index // packed.segments, index % packed.segments + 1
    hidden = np.asarray(hidden).reshape(model.decoder.layers, *packed.tokens.shape, -1)
    of_text = [np.asarray(packed.segment_ids)[r] == s for r, s in zip(row, segment, strict=True)]
    states = [hidden[:, r, members] for r, members in zip(row, of_text, strict=True)]
    return states, np.asarray(out).reshape(-1, model.decoder.width)[index]


def pooled(state: np.ndarray, pooling: str) -> np.ndarray:
    vector = state.mean(axis=0) if pooling == "mean" else state[-1]
    return vector / np.linalg.norm(vector)


def largest(pairs: Any) -> float:
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_layer_and_every_vector_is_that_of_transformers(base_folder: Folder, family: str, attention: str) -> None:
    expected = reference(family, causal=attention == "causal")
    for kernel, pooling in (("einsum", "mean"), ("rows", "last")):
        model, params = load(base_folder(family), EmbeddingSpec(attention, pooling), attention_kernel=kernel)
        states, out = hidden_states(model, params)
        for layer in range(model.decoder.layers):
            assert largest((got[layer], want[layer]) for got, want in zip(states, expected, strict=True)) < 1e-4
        assert largest((got, pooled(want[-1], pooling)) for got, want in zip(out, expected, strict=True)) < 1e-5


def test_a_wrong_mask_and_a_wrong_window_show(base_folder: Folder) -> None:
    causal, params = load(base_folder("mistral-window"), EmbeddingSpec(attention="causal"))
    both_ways = causal.clone(spec=EmbeddingSpec(attention="bidirectional"))
    wide = causal.clone(decoder=dataclasses.replace(causal.decoder, windows=(6, 6, 6)))
    right = vectors(causal, params, *in_rows(texts(), ROW))
    for wrong in (both_ways, wide):
        apart = np.abs(vectors(wrong, params, *in_rows(texts(), ROW)) - right).max(axis=1)
        assert (apart[np.array(LENGTHS) > 8] > 1e-2).all()


@pytest.mark.parametrize("tensor", ["q/bias", "k/bias", "v/bias", "attention_norm/scale", "mlp_norm/scale", "norm/scale"])
def test_every_bias_and_scale_counts(base_folder: Folder, tensor: str) -> None:
    model, params = load(base_folder("qwen2"), EmbeddingSpec())
    neutral = {"bias": 0.0, "scale": 1.0}[tensor.split("/")[1]]

    def without(path: Any, x: jax.Array) -> jax.Array:
        names = "/".join(key.key for key in path)
        return x * 0 + neutral if names.endswith(f"/{tensor}") else x

    packed = in_rows(texts(), ROW)
    changed = jax.tree_util.tree_map_with_path(without, params)
    apart = np.abs(vectors(model, changed, *packed) - vectors(model, params, *packed)).max()
    if tensor == "k/bias":  # in attention without rotation it would cancel
        assert apart > 1e-4
    else:
        assert apart > 1e-2


def test_how_it_runs_changes_neither_vectors_nor_gradients(base_folder: Folder) -> None:
    model, params = load(base_folder("qwen3"), EmbeddingSpec(), attention_kernel="einsum")
    packed, _ = in_rows(texts(), ROW)
    weights = np.random.default_rng(0).normal(size=(packed.segments, model.decoder.width))

    def value_and_gradient(**compute: bool) -> list[jax.Array]:
        variant = model.clone(compute=dataclasses.replace(model.compute, **compute))
        run = jax.value_and_grad(lambda p: (variant.apply({"params": p}, packed) * weights).sum())
        return jax.tree.leaves(jax.jit(run)(params))

    want = value_and_gradient()
    assert min(np.linalg.norm(b) for b in want) > 0
    for compute in ({"remat": True}, {"unroll": False}):
        for a, b in zip(value_and_gradient(**compute), want, strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_layers_run_in_bfloat16_with_float32_vectors(base_folder: Folder) -> None:
    model, params = load(base_folder("qwen2"), EmbeddingSpec())
    half = model.clone(compute=dataclasses.replace(model.compute, dtype=jax.numpy.bfloat16))
    packed = in_rows(texts(), ROW)
    exact, rounded = vectors(model, params, *packed), vectors(half, params, *packed)
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(exact - rounded).max() < 0.1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Published counts, less the language-model head where it is not tied to the embedding.
        ("qwen2-0.5b", 494_032_768),
        ("qwen2-1.5b", 1_543_714_304),
        ("qwen2-7b", 7_615_616_512 - 152_064 * 3584),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360 - 151_936 * 4096),
        ("mistral-7b", 7_241_732_096 - 32_000 * 4096),
        ("llama3-8b", 8_030_261_248 - 128_256 * 4096),
        ("nv-embed", 7_851_016_192),
        ("kalm-embedding-v2", 494_032_768),
    ],
)
def test_published_sizes(name: str, count: int) -> None:
    base = find_base(f"preset:{name}")
    model = EmbeddingModel(base.decoder, base.spec)
    leaves = jax.tree.leaves(nn.unbox(parameter_shapes(model)))
    assert sum(leaf.size for leaf in leaves) == count
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral"}, [4096] * 24),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 24),
        ({"model_type": "mistral", "sliding_window": 7}, [7] * 24),
        ({"model_type": "llama", "sliding_window": 7}, [None] * 24),
        ({"model_type": "qwen2", "sliding_window": 7}, [None] * 24),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, [7] * 24),
        ({"model_type": "qwen3", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 24}, [None] * 24),
        ({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 20}, [None] * 20 + [7] * 4),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 12}, [None, 4096] * 12),
    ],
)
def test_sliding_windows_are_read_as_transformers_reads_them(changes: dict[str, Any], window: list[int | None]) -> None:
    assert list(from_hf({**preset("qwen2-0.5b"), **changes}, "config.json").windows) == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type '?bert'? is not supported"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "896"}, "hidden_size is '896'; expected a whole number from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number from 1 to"),
        ({"num_attention_heads": 13}, "hidden_size 896 is not divisible by num_attention_heads 13"),
        ({"num_key_value_heads": 4}, "num_attention_heads 14 is not divisible by num_key_value_heads 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 63}, "heads are 63 wide; expected an even width"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_scaling": [4.0]}, "rope_scaling is a list of 1; expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"model_type": "mistral", "sliding_window": -4}, "sliding_window is -4"),
        ({"use_sliding_window": True, "layer_types": [[]]}, "layer_types must be a list of 24, one a layer"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**preset("qwen2-0.5b"), **changes}.items() if value is not ...}
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        from_hf(config, "config.json")


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"preset:gpt is unknown; known presets: {', '.join(PRESETS)}"):
        preset("gpt")


def test_linear_rope_scaling(tmp_path: Path) -> None:
    import transformers

    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    torch.manual_seed(0)
    twin = transformers.AutoModel.from_config(transformers.LlamaConfig(**tiny.SIZES, rope_parameters=rope)).eval()
    twin.save_pretrained(tmp_path)
    text = texts()[1]
    with torch.no_grad():
        want = twin(torch.tensor(text[None].astype(np.int64))).last_hidden_state[0].numpy()
    for style in ({}, {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}):
        config = json.loads((tmp_path / "config.json").read_text()) | style
        (tmp_path / "config.json").write_text(json.dumps(config))
        model, params = load(tmp_path, EmbeddingSpec(attention="causal"))
        assert np.abs(vectors(model, params, *in_rows([text], ROW))[0] - pooled(want, "mean")).max() < 1e-5
