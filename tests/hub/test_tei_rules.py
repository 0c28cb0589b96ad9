"""Exported folders under the rules of TEI: what it refuses or computes otherwise stands in the table of readers."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import transformers

from helpers import tei, tiny
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.reader_rules import ServedModel, Status
from jaxembed.hub.readers import judge_readers
from jaxembed.hub.resolve import find_base
from jaxembed.hub.stock_folder import write_stock_folder
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.model.families import TransformerConfig
from jaxembed.model.masks import MASKS
from jaxembed.model.transformer import ComputeOptions

MAX_LENGTH = 24  # tokens
TEXTS = [*tiny.TEXTS, "line one\n\nline two", "x"]
PROMPT = "Instruct: Find the answer\nQuery:"
POOLINGS = {"mean": "mean", "last": "last_token", "first": "cls"}
CAUSAL_LAST = {"attention": "causal", "pooling": "last"}
LATENT = {"pooling": "latent_attention", "latents": 5, "pooling_heads": 2}
# Name: (base, choices of the spec, whether the folder has an ONNX graph).
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen2 causal": ("qwen2", CAUSAL_LAST, False),
    "qwen2 bidirectional": ("qwen2", {}, False),
    "qwen2 with a graph": ("qwen2", {}, True),
    "qwen2 with windows": ("qwen2-mixed", CAUSAL_LAST, False),
    "qwen3 causal": ("qwen3", CAUSAL_LAST, False),
    "qwen3 bidirectional": ("qwen3", {"matryoshka_dims": (16,)}, False),
    "qwen3 first": ("qwen3", {"pooling": "first", "append_eos": False}, False),
    "qwen3 weighted mean": ("qwen3", {"pooling": "weighted_mean"}, False),
    "qwen3 max with a graph": ("qwen3", {"pooling": "max"}, True),
    "qwen3 instruction left out": ("qwen3", {"include_instruction": False}, False),
    "qwen3 instruction left out, graph": ("qwen3", {"include_instruction": False}, True),
    "qwen3 projection": ("qwen3", {"projection": 6, "projection_bias": True, "projection_activation": "tanh"}, False),
    "qwen3 biases": ("qwen3-bias", {}, False),
    "qwen3 linear RoPE": ("qwen3-linear", {}, False),
    "latent attention": ("qwen3", LATENT, False),
    "latent attention, projection, graph": ("qwen3", {**LATENT, "projection": 6}, True),
    "mistral": ("mistral-square", {"pooling": "mean"}, False),
    "mistral other head width": ("mistral", {}, False),
    "mistral linear RoPE": ("mistral-linear", {}, False),
    "mistral bidirectional window": ("mistral-window", {}, False),
    "mistral causal window": ("mistral-window", CAUSAL_LAST, False),
    "llama": ("llama-plain", {}, False),
    "llama biases": ("llama-bias", CAUSAL_LAST, False),
    "llama3 RoPE": ("llama", {"attention": "causal"}, False),
    "llama3 RoPE with a graph": ("llama", {"attention": "causal"}, True),
    "gemma bidirectional": ("gemma-wide", {"projection": 6, "hidden_projections": ({"width": 8},)}, False),
    "gemma bidirectional window": ("gemma3_text", {}, False),
    "gemma causal": ("gemma-wide", CAUSAL_LAST, False),
    "gemma causal with a graph": ("gemma3_text", CAUSAL_LAST, True),
    "gemma first": ("gemma-wide", {"pooling": "first"}, False),
    "gemma first with a graph": ("gemma-wide", {"pooling": "first"}, True),
    "gemma other groups": ("gemma-irregular", {}, False),
    "gemma linear RoPE": ("gemma-linear", {}, False),
    "bert mean": ("bert", {}, False),
    "bert first with a graph": ("bert", {"pooling": "first"}, True),
    "bert last": ("bert", {"pooling": "last"}, False),
    "bert max": ("bert", {"pooling": "max"}, False),
    "roberta": ("roberta", {"pooling": "first"}, False),
    "xlm-roberta": ("xlm-roberta", {"prompts": {"query": PROMPT, "document": ""}, "projection": 6}, False),
    "xlm-roberta instruction left out": ("xlm-roberta", {"include_instruction": False}, False),
    "modernbert": ("modernbert", {}, False),
    "modernbert last": ("modernbert", {"pooling": "last"}, False),
    "modernbert biases": ("modernbert-bias", {}, False),
    "modernbert other groups": ("modernbert-irregular", {}, False),
}
SPECIAL_TOKENS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    **tiny.CONFIGS,
    "qwen3-bias": lambda: transformers.Qwen3Config(**tiny.SIZES, head_dim=16, attention_bias=True),
    "qwen3-linear": lambda: transformers.Qwen3Config(**tiny.SIZES, head_dim=16, rope_parameters=LINEAR),
    "mistral-square": lambda: transformers.MistralConfig(**tiny.SIZES, sliding_window=None),
    "mistral-linear": lambda: transformers.MistralConfig(**tiny.SIZES, sliding_window=None, rope_parameters=LINEAR),
    "llama-plain": lambda: transformers.LlamaConfig(**tiny.SIZES),
    "gemma-wide": lambda: build_gemma_config(sliding_window=4 * MAX_LENGTH),
    "gemma-linear": lambda: build_gemma_config(
        sliding_window=4 * MAX_LENGTH,
        rope_parameters={"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0}},
    ),
    "gemma-irregular": lambda: build_gemma_config(
        sliding_window=4 * MAX_LENGTH, layer_types=["full_attention", "sliding_attention", "full_attention"]
    ),
    "roberta": lambda: transformers.RobertaConfig(**tiny.ENCODER_SIZES, pad_token_id=2, hidden_act="relu"),
    "modernbert-bias": lambda: build_modernbert_config(attention_bias=True, mlp_bias=True, hidden_activation="silu"),
    "modernbert-irregular": lambda: build_modernbert_config(
        layer_types=["sliding_attention", "full_attention", "full_attention"]
    ),
    "llama-bias": lambda: transformers.LlamaConfig(**tiny.SIZES, attention_bias=True),
}
APPROXIMATION = "activation"  # close, not different
Export = tuple[Path, Embedder, ServedModel]


def build_gemma_config(**options: Any) -> Any:
    """Build a config with windows that the texts do not reach, unless the options say otherwise."""
    return transformers.Gemma3TextConfig(**tiny.SIZES, head_dim=16, query_pre_attn_scalar=16, **options)


def build_modernbert_config(**options: Any) -> Any:
    """Build a config with a window of 8 tokens."""
    return transformers.ModernBertConfig(**tiny.ENCODER_SIZES, local_attention=8, **SPECIAL_TOKENS, **options)


@pytest.fixture(scope="module")
def export_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """Return a function that writes the folder of a kind, with weights of zeros: that vectors are equal is tested elsewhere."""
    root = tmp_path_factory.mktemp("tei")

    @functools.cache
    def write(name: str) -> Export:
        family, choices, has_onnx = KINDS[name]
        base_folder, folder = root / "bases" / family, root / name.replace(" ", "-")
        if not base_folder.exists():
            CONFIGS[family]().save_pretrained(base_folder)
            tiny.build_family_tokenizer(family.removesuffix("-bias")).save_pretrained(base_folder)
        spec = EmbeddingSpec(**{"max_length": MAX_LENGTH, "prompts": {"query": PROMPT, "document": ""}, **choices})
        base = find_base(str(base_folder))
        model = EmbeddingModel(base.transformer, spec, ComputeOptions())
        params = jax.tree.map(lambda shape: np.zeros(shape.shape, np.float32), nn.unbox(infer_parameter_shapes(model)))
        embedder = Embedder(model, params, build_text_tokenizer(base.tokenizer(), spec, base), make_mesh(1), base.hf_config)
        write_stock_folder(embedder, folder, "float32")
        if has_onnx:
            (folder / "onnx").mkdir()
            (folder / "onnx" / "model.onnx").touch()
        return folder, embedder, ServedModel(spec, base.transformer, has_onnx=has_onnx)

    return write


def local_theta(transformer: TransformerConfig) -> float:
    """Return the rotary base of layers with a window."""
    return transformer.rope_theta if transformer.local_rope_theta is None else transformer.local_rope_theta


def list_differences(service: tei.Service, embedder: Embedder) -> list[str]:
    """Return in what a service differs from the model."""
    spec, transformer = embedder.spec, embedder.model.transformer
    differences = []
    if service.prompts != spec.prompts:
        differences.append("prompts")
    for prompt in ("", PROMPT):
        tokenized = embedder.tokenizer(TEXTS, [prompt] * len(TEXTS))
        if [service.encode(text, prompt) for text in TEXTS] != [ids.tolist() for ids in tokenized.ids]:
            differences.append("tokens")
        if any(any(service.tokenizer.encode(prompt + text).type_ids) for text in TEXTS):
            differences.append("token types")
    if not spec.include_instruction and spec.pooling != "last":
        differences.append("instruction tokens are pooled")
    if service.pooling == "graph":
        return differences
    if service.pooling != POOLINGS.get(spec.pooling):
        differences.append("pooling")
    if service.is_causal != (spec.attention == "causal"):
        differences.append("mask")
    if bool(service.dense) != bool(spec.projection):
        differences.append("projection")
    if service.activation != transformer.activation:
        differences.append(APPROXIMATION)
    if transformer.position_kind == "rope" and service.thetas != (transformer.rope_theta, local_theta(transformer)):
        differences.append("rotary bases")
    if service.first_position != transformer.position_offset:
        differences.append("positions")
    if service.rope != dict(transformer.rope_scaling).get("rope_type", "none").replace("default", "none"):
        differences.append("RoPE scaling")
    if service.ignored_biases:
        differences.append("biases")
    # TEI counts the tokens before a token, a causal window of w has w - 1 of them.
    is_causal = spec.attention == "causal"
    windows = transformer.get_windows(MASKS[spec.attention])
    reaches = tuple(window and (window - 1 if is_causal else window) for window in windows)
    # Behind a token, Mistral's model of TEI knows no window.
    if service.reaches != reaches or (any(reaches) and not is_causal and transformer.family == "mistral"):
        differences.append("windows")
    if service.skips_mask and (is_causal or any(window and window < MAX_LENGTH for window in windows)):
        differences.append("no mask without padding")
    return differences


@pytest.mark.parametrize("name", KINDS)
def test_the_table_of_readers_agrees_with_the_rules_of_tei(export_kind: Callable[[str], Export], name: str) -> None:
    folder, embedder, model = export_kind(name)
    (verdict,) = [verdict for verdict in judge_readers(model) if verdict.reader.name == "TEI"]
    option = "mean" if "--pooling mean" in verdict.reader.usage(model) else None
    refusals, differences = [], []
    for image in ("cpu", "cuda"):
        try:
            differences += list_differences(tei.start(folder, image, option), embedder)
        except tei.Refusal as refusal:
            refusals.append(str(refusal))
    is_served = len(refusals) < 2 and (model.has_onnx or not option)
    if is_served:
        assert (APPROXIMATION in differences) == ("tanh approximation" in " ".join(verdict.reasons)), verdict.reasons
    if model.has_onnx and "on the CPU image" in " ".join(verdict.reasons):
        differences = list_differences(tei.start(folder, "cpu", option), embedder)
    differences = [difference for difference in differences if difference != APPROXIMATION]
    found = f"{refusals} {differences}; the table: {verdict.status} {verdict.reasons}"
    assert (verdict.status == Status.REFUSED) == (not is_served), found
    assert (verdict.status == Status.DIFFERENT) == (is_served and bool(differences)), found


@pytest.mark.parametrize("name", ["qwen3 weighted mean", "latent attention", "qwen3 max with a graph"])
def test_poolings_that_tei_lacks_are_refused_without_an_option(export_kind: Callable[[str], Export], name: str) -> None:
    folder, *_ = export_kind(name)
    for image in ("cpu", "cuda"):
        with pytest.raises(tei.Refusal, match="1_Pooling"):
            tei.start(folder, image)


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": None}, "pooling_mode_cls_token is None"),
        ("sentence_bert_config.json", {"max_seq_length": None}, "max_seq_length is None"),
        ("config.json", {"eos_token_id": [1, 2]}, "eos_token_id is"),
        ("config.json", {"attention_bias": None}, "attention_bias is None"),
        ("config.json", {"rope_parameters": {"rope_theta": 1e4}}, "rope_type is None"),
        ("config.json", {"use_bidirectional_attention": None}, ["mask"]),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.GELU"}, "GELU"),
        ("modules.json", "sentence_transformers.base.modules.dense.Dense", ["projection"]),
    ],
)
def test_changed_files_are_noticed(
    export_kind: Callable[[str], Export], tmp_path: Path, file: str, change: Any, expected: str | list[str]
) -> None:
    source, embedder, _ = export_kind("qwen3 projection")
    folder = shutil.copytree(source, tmp_path / "changed")
    text = (folder / file).read_text()
    if isinstance(change, str):
        (folder / file).write_text(text.replace("sentence_transformers.models.Dense", change))
    else:
        (folder / file).write_text(json.dumps(json.loads(text) | change))
    if isinstance(expected, list):
        assert list_differences(tei.start(folder, "cuda"), embedder) == expected
    else:
        with pytest.raises(tei.Refusal, match=expected):
            tei.start(folder, "cuda")
