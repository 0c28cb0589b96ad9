"""The transformer agrees with transformers in float32, layer by layer, on packed rows."""

import dataclasses
import functools
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
from helpers.loading import draw_texts, encode_packed, load_model, pack_texts
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.hub.resolve import find_base
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.model.presets import PRESETS, find_preset
from jaxembed.model.transformer import TransformerLayer

LENGTHS = (3, 17, 30, 9, 1, 12)  # some are longer than the sliding window, and some texts share a row
ROW_LENGTH = 32
MASKS = ("causal", "bidirectional")
Folder = Callable[[str], Path]


def draw_test_texts() -> list[np.ndarray]:
    return draw_texts(LENGTHS)


def compute_torch_states(family: str, causal: bool) -> list[list[np.ndarray]]:
    """Return for each text the output [tokens, D] of each layer in transformers, followed by that of the final norm."""
    model = tiny.build_torch_model(family, causal=causal)
    layers: list[Any] = []
    for layer in model.encoder.layer if hasattr(model, "encoder") else model.layers:
        layer.register_forward_hook(lambda _, __, out: layers.append(out[0] if isinstance(out, tuple) else out))
    states = []
    for text in draw_test_texts():
        layers.clear()
        with torch.no_grad():
            final = model(torch.tensor(text[None].astype(np.int64))).last_hidden_state
        states.append([state[0].numpy() for state in (*layers, final)])
    return states


def compute_states(model: EmbeddingModel, params: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Return for each text the outputs of all layers [L, tokens, D], taken from its row; and the vectors [texts, D]."""

    def is_layer(module: nn.Module, method: str) -> bool:
        return isinstance(module, TransformerLayer) and method == "__call__"

    packed, index = pack_texts(draw_test_texts(), ROW_LENGTH)
    apply = functools.partial(model.apply, capture_intermediates=is_layer, mutable=["intermediates"])
    out, captured = jax.jit(lambda p: apply({"params": p}, packed))(params)
    (((hidden, _), _),) = captured["intermediates"]["decoder"]["layers"]["__call__"]
    row, segment = index // packed.segments, index % packed.segments + 1
    hidden = np.asarray(hidden).reshape(model.transformer.layers, *packed.tokens.shape, -1)
    tokens = [np.asarray(packed.segment_ids)[r] == s for r, s in zip(row, segment, strict=True)]
    states = [hidden[:, r, is_member] for r, is_member in zip(row, tokens, strict=True)]
    return states, np.asarray(out).reshape(-1, model.transformer.width)[index]


def pool(state: np.ndarray, pooling: str) -> np.ndarray:
    """Return the unit vector [D] of a text from its last hidden states [tokens, D]."""
    vector = state.mean(axis=0) if pooling == "mean" else state[-1]
    return vector / np.linalg.norm(vector)


def max_error(pairs: Any) -> float:
    """Return the largest absolute difference between the two arrays of any pair."""
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, mask) for family in tiny.CONFIGS for mask in MASKS if mask == "bidirectional" or family not in tiny.ENCODERS],
)
def test_layers_and_vectors_agree_with_transformers(base_folder: Folder, family: str, attention: str) -> None:
    expected = compute_torch_states(family, causal=attention == "causal")
    for kernel, pooling in (("einsum", "mean"), ("rows", "last")):
        model, params = load_model(
            base_folder(family), EmbeddingSpec(attention=attention, pooling=pooling), attention_kernel=kernel
        )
        states, out = compute_states(model, params)
        for layer in range(model.transformer.layers):
            assert max_error((ours[layer], reference[layer]) for ours, reference in zip(states, expected, strict=True)) < 1e-4
        assert max_error((ours, pool(reference[-1], pooling)) for ours, reference in zip(out, expected, strict=True)) < 1e-5


def test_a_padding_token_in_a_text_has_no_position_in_xlm_roberta(base_folder: Folder) -> None:
    texts = draw_test_texts()
    for text in texts[1:4]:
        text[[2, 5, 6]] = 2
    torch_model, model_and_params = (
        tiny.build_torch_model("xlm-roberta"),
        load_model(base_folder("xlm-roberta"), EmbeddingSpec()),
    )
    vectors = encode_packed(*model_and_params, *pack_texts(texts, ROW_LENGTH))
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor(text[None].astype(np.int64))
        with torch.no_grad():
            want = torch_model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()
        assert np.abs(vector - pool(want, "mean")).max() < 1e-5


def test_a_wrong_mask_or_window_changes_the_vectors(base_folder: Folder) -> None:
    causal, params = load_model(base_folder("mistral-window"), EmbeddingSpec(attention="causal"))
    bidirectional = causal.clone(spec=EmbeddingSpec(attention="bidirectional"))
    wide = causal.clone(transformer=dataclasses.replace(causal.transformer, windows=(6, 6, 6)))
    right = encode_packed(causal, params, *pack_texts(draw_test_texts(), ROW_LENGTH))
    for wrong in (bidirectional, wide):
        apart = np.abs(encode_packed(wrong, params, *pack_texts(draw_test_texts(), ROW_LENGTH)) - right).max(axis=1)
        assert (apart[np.array(LENGTHS) > 8] > 1e-2).all()


@pytest.mark.parametrize("tensor", ["q/bias", "k/bias", "v/bias", "attention_norm/scale", "mlp_norm/scale", "norm/scale"])
def test_every_bias_and_scale_changes_the_vectors(base_folder: Folder, tensor: str) -> None:
    model, params = load_model(base_folder("qwen2"), EmbeddingSpec())
    neutral = {"bias": 0.0, "scale": 1.0}[tensor.split("/")[1]]

    def without(path: Any, x: jax.Array) -> jax.Array:
        names = "/".join(key.key for key in path)
        return x * 0 + neutral if names.endswith(f"/{tensor}") else x

    packed = pack_texts(draw_test_texts(), ROW_LENGTH)
    changed = jax.tree_util.tree_map_with_path(without, params)
    apart = np.abs(encode_packed(model, changed, *packed) - encode_packed(model, params, *packed)).max()
    if tensor == "k/bias":  # without rotary positions it would cancel in the softmax
        assert apart > 1e-4
    else:
        assert apart > 1e-2


@pytest.mark.parametrize("family", ["qwen3", "modernbert"])
def test_compute_options_change_neither_vectors_nor_gradients(base_folder: Folder, family: str) -> None:
    """The layers of ModernBERT differ in window, rotary base and norms."""
    model, params = load_model(base_folder(family), EmbeddingSpec(), attention_kernel="einsum")
    packed, _ = pack_texts(draw_test_texts(), ROW_LENGTH)
    weights = np.random.default_rng(0).normal(size=(packed.segments, model.transformer.width))

    def value_and_gradient(**compute: bool) -> list[jax.Array]:
        variant = model.clone(compute=dataclasses.replace(model.compute, **compute))
        run = jax.value_and_grad(lambda p: (variant.apply({"params": p}, packed) * weights).sum())
        return jax.tree.leaves(jax.jit(run)(params))

    want = value_and_gradient()
    assert min(np.linalg.norm(b) for b in want) > 0
    for compute in ({"remat": True}, {"unroll": False}):
        for a, b in zip(value_and_gradient(**compute), want, strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_a_bfloat16_model_returns_float32_vectors(base_folder: Folder) -> None:
    model, params = load_model(base_folder("qwen2"), EmbeddingSpec())
    half = model.clone(compute=dataclasses.replace(model.compute, dtype=jax.numpy.bfloat16))
    packed = pack_texts(draw_test_texts(), ROW_LENGTH)
    exact, rounded = encode_packed(model, params, *packed), encode_packed(half, params, *packed)
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(exact - rounded).max() < 0.1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Published counts, without the language-model head where it is not tied to the embedding.
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
        ("gemma3-270m", 268_098_176),
        ("modernbert-base", 149_014_272 + 768),  # with a norm in the first layer too, which is not used
        ("embeddinggemma-300m", 302_863_104 + 2 * 768 * 3072),
        # Without the pooler, a matrix and a bias that sentence-transformers does not use.
        ("minilm-l6", 22_713_216 - 384 * 385),
        ("bert-base", 109_482_240 - 768 * 769),
        ("bert-large", 335_141_888 - 1024 * 1025),
        ("roberta-base", 124_645_632 - 768 * 769),
        ("xlm-roberta-base", 278_043_648 - 768 * 769),
        ("bge-m3", 567_754_752 - 1024 * 1025),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    base = find_base(f"preset:{name}")
    model = EmbeddingModel(base.transformer, base.spec)
    leaves = jax.tree.leaves(nn.unbox(infer_parameter_shapes(model)))
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
def test_sliding_windows_follow_transformers(changes: dict[str, Any], window: list[int | None]) -> None:
    assert list(parse_hf_config({**find_preset("qwen2-0.5b"), **changes}, "config.json").windows) == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type gpt2 is not supported .expected qwen2, .*, bert, roberta, xlm-roberta or nvembed"),
        ({"model_type": "mpnet"}, "model_type mpnet is not supported, because it needs relative position biases .expected"),
        ({"hidden_act": "laplace"}, "hidden_act 'laplace' is not supported .expected silu, swish, gelu"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": -1}}, "beta_fast is -1"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "896"}, "hidden_size is '896' .expected an integer from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0 .expected an integer from 1 to"),
        ({"num_attention_heads": 13}, "hidden_size 896 is not divisible by num_attention_heads 13"),
        ({"num_key_value_heads": 4}, "num_attention_heads 14 is not divisible by num_key_value_heads 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 63}, r"the head width is 63 \(expected an even number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan .expected a finite number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_scaling": [4.0]}, "rope_scaling is a list of 1 .expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes' .expected true or false"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"model_type": "mistral", "sliding_window": -4}, "sliding_window is -4"),
        (
            {"use_sliding_window": True, "layer_types": [[]]},
            r"layer_types is invalid \(found a list of 1; expected a list of 24",
        ),
        ({"layer_types": ["full_attention"] * 25}, r"layer_types is invalid \(found a list of 25; expected a list of 24"),
        ({"model_type": "llama", "layer_types": "full"}, r"layer_types is invalid \(found 'full'; expected a list of 24"),
    ],
)
def test_unsupported_configs_are_errors(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**find_preset("qwen2-0.5b"), **changes}.items() if value is not ...}
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        parse_hf_config(config, "config.json")


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"model.base: unknown preset 'gpt'. Known presets: {', '.join(PRESETS)}."):
        find_preset("gpt")


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}),
        ("llama", YARN),
        ("qwen3", {**YARN, "rope_theta": 500.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}),
        ("qwen3", {**YARN, "attention_factor": 1.5}),
        ("qwen3", {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}),
        ("gemma3_text", {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}),
    ],
)
def test_rope_scaling(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    """The scaling is read from its new place and from the old one, beside `rope_theta`."""
    import transformers

    torch.manual_seed(0)
    config = type(tiny.CONFIGS[family]()).from_dict({**tiny.CONFIGS[family]().to_dict(), "rope_parameters": rope})
    torch_model = transformers.AutoModel.from_config(config).eval()
    torch_model.save_pretrained(tmp_path)
    text = draw_test_texts()[2]
    with torch.no_grad():
        want = torch_model(torch.tensor(text[None].astype(np.int64))).last_hidden_state[0].numpy()
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    styles: list[dict[str, Any]] = [{}]
    if family != "gemma3_text":
        styles.append({"rope_parameters": None, "rope_theta": rope["rope_theta"], "rope_scaling": old})
    for style in styles:
        written = json.loads((tmp_path / "config.json").read_text()) | style
        (tmp_path / "config.json").write_text(json.dumps(written))
        model, params = load_model(tmp_path, EmbeddingSpec(attention="causal"))
        assert np.abs(encode_packed(model, params, *pack_texts([text], ROW_LENGTH))[0] - pool(want, "mean")).max() < 1e-5
        plain = model.clone(transformer=dataclasses.replace(model.transformer, rope_scaling=()))
        assert np.abs(encode_packed(plain, params, *pack_texts([text], ROW_LENGTH))[0] - pool(want, "mean")).max() > 1e-3
