"""The JSON files of a stock folder: the right values under the keys that each reader looks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jaxembed.config.spec import EmbeddingSpec, HiddenProjection
from jaxembed.formats import stock_files
from jaxembed.formats.hf_config import parse_hf_config

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TOKENIZER = SimpleNamespace(bos_token_id=None, eos_token_id=7, pad_token_id=None)
STOCK = "sentence_transformers.models."


def build_config(family: str, spec: EmbeddingSpec, **fields: Any) -> dict[str, Any]:
    hf_config = {"model_type": family, **SIZES, **fields}
    return stock_files.build_config(hf_config, spec, parse_hf_config(hf_config, family), TOKENIZER, "bfloat16")


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("qwen2", "Qwen2Model"), ("qwen3", "Qwen3Model"), ("mistral", "MistralForCausalLM"), ("llama", "LlamaModel")],
)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_config_states_mask_positions_tokens_and_class(family: str, architecture: str, attention: str) -> None:
    config = build_config(family, EmbeddingSpec(attention=attention), rope_theta=5e5, head_dim=16, torch_dtype="float16")
    is_causal = attention == "causal"
    assert (config["is_causal"], config["use_bidirectional_attention"]) == (is_causal, not is_causal)
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (7, 7, None)
    assert (config["dtype"], config["head_dim"], config["architectures"]) == ("bfloat16", 16, [architecture])
    assert (config["rope_theta"], config["rope_parameters"]) == (5e5, {"rope_type": "default", "rope_theta": 5e5})
    assert not {"rope_scaling", "torch_dtype", "matryoshka_dimensions"} & config.keys()
    assert parse_hf_config(config, "again") == parse_hf_config({"model_type": family, **SIZES} | config, family)


def test_rope_scaling_is_written_for_old_and_new_readers() -> None:
    config = build_config("llama", EmbeddingSpec(), rope_parameters={**LLAMA3, "rope_theta": 1e4})
    assert config["rope_scaling"] == LLAMA3
    assert config["rope_parameters"] == {**LLAMA3, "rope_theta": 1e4}
    assert type(config["rope_scaling"]["original_max_position_embeddings"]) is int
    assert config["rope_theta"] == 1e4


def test_matryoshka_widths_include_that_of_the_whole_vector() -> None:
    assert build_config("qwen3", EmbeddingSpec(matryoshka_dims=(16, 8)))["matryoshka_dimensions"] == [8, 16, 32]
    projected = EmbeddingSpec(matryoshka_dims=(8,), projection=24)
    assert build_config("qwen3", projected, matryoshka_dimensions=[4])["matryoshka_dimensions"] == [8, 24]


@pytest.mark.parametrize("pooling", ["weighted_mean", "max", "latent_attention", "self_attention"])
def test_poolings_that_servers_lack_have_a_class_name_that_they_refuse(pooling: str) -> None:
    assert build_config("qwen3", EmbeddingSpec(pooling=pooling))["architectures"] == ["Qwen3ModelWithOwnPooling"]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, [("", STOCK + "Transformer"), ("1_Pooling", STOCK + "Pooling"), ("2_Normalize", STOCK + "Normalize")]),
        (
            {"projection": 6, "normalize": False},
            [("", STOCK + "Transformer"), ("1_Pooling", STOCK + "Pooling"), ("2_Dense", STOCK + "Dense")],
        ),
        (
            {"pooling": "latent_attention"},
            [
                ("", STOCK + "Transformer"), ("1_TokenPooling", "token_pooling.TokenPooling"),
                ("2_Pooling", STOCK + "Pooling"), ("3_Normalize", STOCK + "Normalize"),
            ],
        ),
    ],
)  # fmt: skip
def test_modules_have_the_types_of_every_version(choices: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    modules = stock_files.build_module_list(EmbeddingSpec(**choices))
    assert [(module["path"], module["type"]) for module in modules] == expected
    assert [(module["idx"], module["name"]) for module in modules] == [(i, str(i)) for i in range(len(modules))]


@pytest.mark.parametrize(
    ("pooling", "flag"),
    [
        ("mean", "mean_tokens"), ("last", "lasttoken"), ("first", "cls_token"), ("max", "max_tokens"),
        ("weighted_mean", "weightedmean_tokens"), ("latent_attention", "mean_tokens"),
    ],
)  # fmt: skip
def test_pooling_config_has_width_and_flags_before_the_prompt(pooling: str, flag: str) -> None:
    config = stock_files.build_pooling_config(EmbeddingSpec(pooling=pooling, include_instruction=False), 32)
    first, *flags, last = config.items()
    assert (first, last) == (("word_embedding_dimension", 32), ("include_prompt", False))
    assert [key for key, value in flags if value] == [f"pooling_mode_{flag}"]
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"} <= config.keys(), "TEI needs them"


def test_the_remaining_module_configs() -> None:
    spec = EmbeddingSpec(projection=6, projection_bias=True, projection_activation="tanh", max_length=77)
    tanh = {"in_features": 32, "out_features": 6, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    assert stock_files.build_dense_configs(spec, 32) == [tanh]
    identity = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    both = stock_files.build_dense_configs(EmbeddingSpec(projection=6, hidden_projections=(HiddenProjection(width=48),)), 32)
    assert both == [{"in_features": 32, "out_features": 48, **identity}, {"in_features": 48, "out_features": 6, **identity}]
    assert stock_files.build_dense_configs(EmbeddingSpec(), 32) == []
    assert stock_files.build_transformer_config(spec) == {"max_seq_length": 77, "do_lower_case": False}


def test_model_config_has_prompts_similarity_and_requirements() -> None:
    causal = stock_files.build_model_config(EmbeddingSpec(attention="causal", prompts={"query": "q: "}), "qwen3")
    assert "requirements" not in causal
    assert (causal["prompts"], causal["default_prompt_name"]) == ({"query": "q: ", "document": ""}, None)
    assert (causal["similarity_fn_name"], causal["model_type"]) == ("cosine", "SentenceTransformer")
    bidirectional = stock_files.build_model_config(EmbeddingSpec(plain_prompt="p: ", prompts={"document": "d: "}), "qwen3")
    assert bidirectional["requirements"]["transformers"]["specifier"] == ">=5.2"
    assert "requirements" not in stock_files.build_model_config(EmbeddingSpec(), "bert"), "its class has the mask"
    assert bidirectional["prompts"] == {"query": "", "document": "d: ", "plain": "p: "}
    assert bidirectional["default_prompt_name"] == "plain"


@pytest.mark.parametrize(
    ("family", "attention", "expected"),
    [
        ("qwen2", "bidirectional", "TokenizersBackend"),
        ("qwen2", "causal", "Qwen2Tokenizer"),
        ("llama", "bidirectional", "TokenizersBackend"),
        ("llama", "causal", "PreTrainedTokenizerFast"),
    ],
)
def test_transformers_4_loads_the_tokenizer_of_causal_models_only(family: str, attention: str, expected: str) -> None:
    saved = {"tokenizer_class": "Qwen2Tokenizer" if family == "qwen2" else "LlamaTokenizer", "is_local": True, "errors": "x"}
    spec, transformer = EmbeddingSpec(attention=attention), parse_hf_config({"model_type": family, **SIZES}, family)
    config = stock_files.build_tokenizer_config(saved, spec, transformer, adds_bos=True, adds_eos=False)
    assert config == {"tokenizer_class": expected, "errors": "x", "add_bos_token": True, "add_eos_token": False}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (
            "TokenizersBackend",
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]},
        ),
        ("BertTokenizer", {"tokenizer_class": "BertTokenizer"}),
    ],
)
def test_the_tokenizer_of_an_encoder_has_a_class_that_all_versions_know(saved: str, expected: dict[str, Any]) -> None:
    transformer = parse_hf_config({"model_type": "bert", **SIZES}, "bert")
    assert stock_files.build_tokenizer_config({"tokenizer_class": saved}, EmbeddingSpec(), transformer, True, True) == expected
