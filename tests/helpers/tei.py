"""How Hugging Face's text-embeddings-inference (TEI) reads a model folder, restated from its source.

Read at commit 0d124dc of 24 July 2026.
TEI is written in Rust and runs neither in tests nor from a Python package. Each function names the file whose rules it follows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from tokenizers import Tokenizer

Image = Literal["cpu", "cuda"]  # the Docker images: ONNX Runtime and candle in float32, candle in float16
Fields = Mapping[str, str]  # type by key: a key of TYPES, with "?" if it may be absent

# count: an integer from 0 on; activation: a key of ACTIVATIONS; rope: an object with the fields of ROPE.
TYPES: Mapping[str, tuple[type, ...]] = {
    "count": (int,), "number": (int, float), "flag": (bool,), "text": (str,), "activation": (str,), "rope": (dict,),
}  # fmt: skip
# What it computes for an activation: GELU only in its tanh approximation (backends/candle/src/layers/linear.rs).
ACTIVATIONS = {
    "gelu": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swiglu": "swiglu", "tanh": "tanh",
}  # fmt: skip
ROPE = {"rope_theta": "number", "rope_type": "text"}
ROUTER_CONFIG = {"model_type": "text", "max_position_embeddings": "count?", "pad_token_id": "count?"}
ORT_CONFIG = {
    "pad_token_id": "count?", "eos_token_id": "count?", "hidden_size": "count", "num_hidden_layers": "count",
    "num_key_value_heads": "count?",
}  # fmt: skip
DECODER = {
    "vocab_size": "count", "hidden_size": "count", "intermediate_size": "count", "num_hidden_layers": "count",
    "num_attention_heads": "count", "num_key_value_heads": "count", "hidden_act": "activation",
    "max_position_embeddings": "count", "rms_norm_eps": "number", "rope_theta": "number?", "rope_parameters": "rope?",
    "sliding_window": "count?",
}  # fmt: skip
MISTRAL = {**DECODER, "initializer_range": "number", "use_bidirectional_attention": "flag?"}
BERT = {
    "vocab_size": "count", "hidden_size": "count", "num_hidden_layers": "count", "num_attention_heads": "count",
    "intermediate_size": "count", "hidden_act": "activation", "hidden_dropout_prob": "number",
    "max_position_embeddings": "count", "type_vocab_size": "count", "initializer_range": "number", "layer_norm_eps": "number",
    "pad_token_id": "count", "classifier_dropout": "number?",
}  # fmt: skip
CANDLE_CONFIGS: Mapping[str, Fields] = {
    "qwen2": {**DECODER, "use_sliding_window": "flag", "is_causal": "flag?"},
    "qwen3": {
        **DECODER, "use_sliding_window": "flag", "attention_bias": "flag", "head_dim": "count?", "eos_token_id": "count",
        "use_bidirectional_attention": "flag?",
    },
    "mistral": MISTRAL,
    "llama": {
        **MISTRAL, "head_dim": "count?", "attention_bias": "flag?", "bos_token_id": "count?", "eos_token_id": "count?",
        "pad_token_id": "count?", "mlp_bias": "flag?", "pretraining_tp": "count?", "tie_word_embeddings": "flag?",
    },
    "gemma3_text": {
        "attention_bias": "flag", "pad_token_id": "count", "head_dim": "count?", "hidden_activation": "activation",
        "hidden_size": "count", "intermediate_size": "count", "max_position_embeddings": "count",
        "num_attention_heads": "count", "num_hidden_layers": "count", "num_key_value_heads": "count",
        "query_pre_attn_scalar": "count", "rms_norm_eps": "number", "rope_local_base_freq": "number", "rope_theta": "number?",
        "rope_parameters": "rope?", "sliding_window": "count?", "_sliding_window_pattern": "count",
        "use_bidirectional_attention": "flag", "vocab_size": "count",
    },
    "modernbert": {
        "vocab_size": "count", "hidden_size": "count", "intermediate_size": "count", "num_hidden_layers": "count",
        "num_attention_heads": "count", "hidden_activation": "activation", "max_position_embeddings": "count",
        "initializer_range": "number", "initializer_cutoff_factor": "number", "norm_eps": "number", "norm_bias": "flag",
        "pad_token_id": "count", "eos_token_id": "count", "bos_token_id": "count", "cls_token_id": "count",
        "sep_token_id": "count", "global_rope_theta": "number", "attention_bias": "flag", "attention_dropout": "number",
        "global_attn_every_n_layers": "count", "local_attention": "count", "local_rope_theta": "number",
        "embedding_dropout": "number?", "mlp_bias": "flag?", "mlp_dropout": "number?", "decoder_bias": "flag?",
        "classifier_pooling": "text?", "classifier_dropout": "number?", "classifier_bias": "flag?",
        "classifier_activation": "activation", "deterministic_flash_attn": "flag?", "sparse_prediction": "flag?",
        "sparse_pred_ignore_index": "number?", "reference_compile": "flag?", "num_labels": "count?",
    },
    "bert": BERT, "roberta": BERT, "xlm-roberta": BERT,
}  # fmt: skip
DENSE_ACTIVATIONS = ("torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity")
MODULE_TYPES = tuple(f"sentence_transformers.models.{kind}" for kind in ("Dense", "Normalize", "Pooling", "Transformer"))


class Refusal(Exception):
    """TEI does not start."""


@dataclasses.dataclass(frozen=True)
class Service:
    """What TEI computes for a folder.

    Attributes:
        tokenizer: Truncates to the maximum length.
        prompts: Prompts by name.
        pooling: cls, mean or last_token; "graph" if the ONNX graph computes the vectors.
        is_causal: Whether the mask is causal. None: as the graph says, and so for the fields below.
        reaches: How many tokens before a token it sees, in each layer; None: all.
        activation: Activation of the feed-forward layers.
        thetas: Bases of the rotary positions, in layers without and with a window; empty: learned positions.
        rope: RoPE scaling: none, llama3 or ntk.
        first_position: Row of the learned positions of the first token.
        dense: Folders of the Dense modules.
        ignored_biases: Biases of the weights that it does not read.
        skips_mask: Whether it applies no mask to a batch of texts of the same length.
    """

    tokenizer: Tokenizer
    prompts: dict[str, str]
    pooling: str
    is_causal: bool | None = None
    reaches: tuple[int | None, ...] = ()
    activation: str | None = None
    thetas: tuple[float, ...] = ()
    rope: str | None = None
    first_position: int = 0
    dense: tuple[str, ...] = ()
    ignored_biases: frozenset[str] = frozenset()
    skips_mask: bool = False

    def encode(self, text: str, prompt: str = "") -> list[int]:
        """Return the tokens of a text under a prompt, all of which are pooled (core/src/tokenization.rs)."""
        return list(self.tokenizer.encode(prompt + text).ids)


def start(folder: Path, image: Image, pooling: str | None = None) -> Service:
    """Start TEI with the options --model-id FOLDER and --pooling (router/src/lib.rs).

    Raises:
        Refusal: It does not start.
    """
    config = _read(folder / "config.json")
    check_fields(config, ROUTER_CONFIG, "config.json")
    if any(not isinstance(name, str) or name.endswith("Classification") for name in config["architectures"]):
        raise Refusal("config.json: not an embedding model")
    pooling = pooling or read_pooling(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_read_max_length(folder, config), strategy="longest_first")
    prompts = _read(folder / "config_sentence_transformers.json").get("prompts") or {}
    check_fields(prompts, dict.fromkeys(prompts, "text"), "prompts")
    shared: dict[str, Any] = {"tokenizer": tokenizer, "prompts": prompts}
    graphs = [folder / "model.onnx", folder / "onnx" / "model.onnx"]
    if image == "cpu" and any(path.is_file() for path in graphs):
        check_fields(config, ORT_CONFIG, "config.json")
        if _read(folder / "tokenizer_config.json").get("padding_side", "right") not in ("left", "right"):
            raise Refusal("tokenizer_config.json: padding_side")
        return Service(**shared, pooling="graph")
    return Service(**shared, pooling=pooling, dense=read_dense(folder), **_read_transformer(folder, config, image, pooling))


def check_fields(config: Mapping[str, Any], fields: Fields, where: str) -> None:
    """Check the types of values as serde does. null counts as absent, and only keys with "?" may be absent.

    Raises:
        Refusal: A value has another type, or is absent.
    """
    for key, kind in fields.items():
        value = config.get(key)
        if value is None and kind.endswith("?"):
            continue
        types = TYPES[kind.rstrip("?")]
        is_right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        is_known = not kind.startswith("activation") or value in ACTIVATIONS
        if not is_right or not is_known or (kind.startswith("count") and value < 0):
            raise Refusal(f"{where}: {key} is {value!r} (expected {kind})")
        if kind.startswith("rope"):
            check_fields(value, ROPE, f"{where}: {key}")


def read_pooling(folder: Path) -> str:
    """Return the pooling of 1_Pooling (router/src/lib.rs). TEI reads it even if the graph contains the pooling.

    Raises:
        Refusal: There is no such folder, or its pooling is another one.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        raise Refusal("no 1_Pooling/config.json, and no --pooling")
    config, flag = _read(path), "pooling_mode_{}".format
    fields = {flag("cls_token"): "flag", flag("mean_tokens"): "flag", flag("lasttoken"): "flag?"}
    check_fields(config, fields, "1_Pooling/config.json")
    for name, pooling in (("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last_token")):
        if config.get(flag(name)):
            return pooling
    raise Refusal("1_Pooling/config.json: no pooling that it has")


def _read_max_length(folder: Path, config: Mapping[str, Any]) -> int:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return int(config["max_position_embeddings"])
    st_config = _read(path)
    check_fields(st_config, {"max_seq_length": "count"}, path.name)
    return int(st_config["max_seq_length"])


def read_dense(folder: Path) -> tuple[str, ...]:
    """Return the folders of the Dense modules (backends/src/lib.rs). With a module of another type, TEI applies none.

    Raises:
        Refusal: A Dense module has another activation.
    """
    modules = _read(folder / "modules.json")
    try:
        for module in modules:
            check_fields(module, {"idx": "count", "name": "text", "path": "text", "type": "text"}, "modules.json")
    except Refusal:
        return ()
    if any(module["type"] not in MODULE_TYPES for module in modules):
        return ()
    paths = tuple(module["path"] for module in modules if module["type"] == MODULE_TYPES[0])
    for path in paths:
        config = _read(folder / path / "config.json")
        check_fields(config, {"in_features": "count", "out_features": "count", "bias": "flag"}, path)
        if config.get("activation_function", DENSE_ACTIVATIONS[0]) not in DENSE_ACTIVATIONS:
            raise Refusal(f"{path}: {config['activation_function']}")
    return paths


def _read_transformer(folder: Path, config: Mapping[str, Any], image: Image, pooling: str) -> dict[str, Any]:
    """Return the fields of `Service` that candle's model decides (backends/candle/src/lib.rs).

    Raises:
        Refusal: It has no such model on this device.
    """
    family = config["model_type"]
    if family not in CANDLE_CONFIGS:
        raise Refusal(f"config.json: model_type {family}")
    check_fields(config, CANDLE_CONFIGS[family], "config.json")
    activation = {"activation": ACTIVATIONS[config.get("hidden_act") or config["hidden_activation"]]}
    if family in ("bert", "roberta", "xlm-roberta"):
        return activation | _read_bert(config, image, pooling)
    if family == "modernbert":
        return activation | _read_modernbert(folder, config, image, pooling)
    if config.get("rope_theta") is None and config.get("rope_parameters") is None:
        raise Refusal("config.json: no rope_theta")
    if family == "gemma3_text":
        return activation | _read_gemma(config, pooling)
    return activation | _read_decoder(folder, config, image)


def _read_bert(config: Mapping[str, Any], image: Image, pooling: str) -> dict[str, Any]:
    """Return what models/bert.rs and flash_bert.rs do. The position of the first token is that of router/src/lib.rs.

    Raises:
        Refusal: The positions are not learned, or it cannot pool like this on the device.
    """
    if config.get("position_embedding_type", "absolute") != "absolute" or not isinstance(config.get("use_cache", True), bool):
        raise Refusal("config.json: position_embedding_type or use_cache")
    if pooling == "last_token" and image == "cpu":
        raise Refusal("last_token is not supported for Bert")
    first_position = 0 if config["model_type"] == "bert" else config["pad_token_id"] + 1
    layers = config["num_hidden_layers"]
    return {"is_causal": False, "reaches": (None,) * layers, "rope": "none", "first_position": first_position}


def _read_modernbert(folder: Path, config: Mapping[str, Any], image: Image, pooling: str) -> dict[str, Any]:
    """Return what models/modernbert.rs and flash_modernbert.rs do. The norms have no biases.

    Raises:
        Refusal: It cannot pool like this on the device.
    """
    if pooling == "last_token" and image == "cpu":
        raise Refusal("LastToken is not supported for ModernBert")
    reach, group = config["local_attention"] // 2, config["global_attn_every_n_layers"]
    read_biases = {"mlp.Wi.bias", "mlp.Wo.bias", *(("attn.Wqkv.bias", "attn.Wo.bias") if config["attention_bias"] else ())}
    return {
        "is_causal": False,
        "reaches": tuple(reach if i % group else None for i in range(config["num_hidden_layers"])),
        "thetas": (config["global_rope_theta"], config["local_rope_theta"]),
        "rope": "none",
        "ignored_biases": frozenset(_list_layer_biases(folder) - read_biases),
    }


def _read_gemma(config: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """Return what models/gemma3.rs does, in float32 on every device. It adds its masks to that of the padding.

    Raises:
        Refusal: It cannot pool like this.
    """
    if pooling == "cls":
        raise Refusal("Only Mean and Last-Token pooling are supported for Gemma3")
    is_causal, group, window = (
        not config["use_bidirectional_attention"],
        config["_sliding_window_pattern"],
        config["sliding_window"],
    )
    reach = None if window is None else window - 1 if is_causal else window // 2
    thetas = (config.get("rope_theta") or config["rope_parameters"]["rope_theta"], config["rope_local_base_freq"])
    return {
        "is_causal": is_causal,
        "reaches": tuple(reach if (i + 1) % group else None for i in range(config["num_hidden_layers"])),
        "thetas": thetas,
        "rope": "none",
        "skips_mask": True,
    }


def _read_decoder(folder: Path, config: Mapping[str, Any], image: Image) -> dict[str, Any]:
    """Return what models/qwen3.rs, flash_qwen2.rs, flash_qwen3.rs and flash_mistral.rs do.

    Raises:
        Refusal: It has no such decoder on this device, or the weights have other shapes.
    """
    family = config["model_type"]
    if image == "cpu" and family != "qwen3":
        raise Refusal(f"{family} is only supported on CUDA devices")
    if config.get("use_sliding_window"):
        raise Refusal("a sliding window is not supported")
    rope = _read_rope_scaling(config)
    if family == "llama" and rope != "none":
        raise Refusal("RoPE scaling is not supported")
    with safe_open(folder / "model.safetensors", "np") as file:
        query_shape = file.get_slice("layers.0.self_attn.q_proj.weight").get_shape()
    if family != "qwen3" and query_shape != [config["hidden_size"]] * 2:
        raise Refusal(f"q_proj has the shape {query_shape}")
    is_causal = config.get("is_causal", True) if family == "qwen2" else not config.get("use_bidirectional_attention")
    read_biases = {f"self_attn.{side}_proj.bias" for side in "qkv"} if family.startswith("qwen") else set[str]()
    reach = config.get("sliding_window") if family in ("mistral", "llama") else None
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return {
        "is_causal": is_causal,
        "reaches": (reach,) * config["num_hidden_layers"],
        "thetas": (theta, theta),
        "rope": rope if family == "mistral" else "none",
        "ignored_biases": frozenset(_list_layer_biases(folder) - read_biases),
    }


def _list_layer_biases(folder: Path) -> set[str]:
    """Return the names of the biases in the first layer."""
    with safe_open(folder / "model.safetensors", "np") as file:
        names = list(file.keys())
    return {name.removeprefix("layers.0.") for name in names if name.startswith("layers.0.") and name.endswith("bias")}


def _read_rope_scaling(config: Mapping[str, Any]) -> str:
    """Return the kind of scaling that `rope_scaling` asks for (backends/candle/src/layers/rotary.rs)."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return "none"
    kind = {"rope_type": scaling.get("rope_type", scaling.get("type")), "factor": scaling.get("factor")}
    check_fields(kind, {"rope_type": "text", "factor": "number"}, "rope_scaling")
    is_llama3 = {"high_freq_factor", "low_freq_factor", "original_max_position_embeddings"} <= scaling.keys()
    return "llama3" if is_llama3 else "ntk"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
