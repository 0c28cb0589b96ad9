"""One decoder serves every family; a family is a row in FAMILIES, a published size a row in PRESETS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from jaxembed.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder, in the terms of Hugging Face configs (see `from_hf`)."""

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_epsilon: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    tie_embeddings: bool = False
    max_positions: int = 32_768


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model family's config file leaves unsaid.

    `window`: a sliding window is always on where the config has one, switched by use_sliding_window, or never read.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["always", "switched", "never"] = "never"
    architecture: str = ""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2": Family(qkv_bias=True, window="switched", architecture="Qwen2Model"),
        "qwen3": Family(qk_norm=True, window="switched", architecture="Qwen3Model"),
        "mistral": Family(window="always", architecture="MistralModel"),
        "llama": Family(architecture="LlamaModel"),
    }
)

_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32_768}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # For training from scratch. In Qwen3's form, since transformers puts its own tokenizer on qwen2 folders.
        "tiny": {
            **_QWEN2, "model_type": "qwen3", "head_dim": 64, "vocab_size": 8192, "hidden_size": 256,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256,
            "tie_word_embeddings": True,
        },
        "qwen2-0.5b": {
            **_QWEN2, "vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": True,
        },
        "mistral-7b": {
            "model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336, "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0, "max_position_embeddings": 32_768, "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
    }
)  # fmt: skip


def preset(name: str) -> Mapping[str, Any]:
    """The Hugging Face config of a preset, or `UserError` listing the known ones."""
    if name not in PRESETS:
        raise UserError(f"model.base preset:{name} is unknown; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def from_hf(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Reads a Hugging Face config (`where` names its origin); `UserError` on a family or feature not supported."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind} is not supported; supported: {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu" or config.get("mlp_bias"):
        raise UserError(f"{where}: only silu feed-forward layers without bias are supported")
    family = FAMILIES[kind]
    rope = _rope(config, where)
    try:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        return DecoderConfig(
            family=kind,
            vocab_size=config["vocab_size"],
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or width // heads,
            mlp_width=config["intermediate_size"],
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.pop("rope_theta"),
            rope_scaling=tuple(sorted(rope.items())),
            qkv_bias=family.qkv_bias or bool(config.get("attention_bias")),
            out_bias=bool(config.get("attention_bias")),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(config, family, where),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=config.get("max_position_embeddings", 32_768),
        )
    except KeyError as missing:
        raise UserError(f"{where}: {missing.args[0]} is missing; is this a whole config.json?") from None


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and the scaling's entries, from the new form (rope_parameters) or the old one."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: rope_type {rope['rope_type']!r} is not supported; supported: default, linear, llama3")
    return rope


def _sliding_window(config: Mapping[str, Any], family: Family, where: str) -> int | None:
    """The window that all layers share, or None; layers that differ are refused."""
    window = config.get("sliding_window", 4096)
    off = family.window == "never" or (family.window == "switched" and not config.get("use_sliding_window"))
    if window is None or off:
        return None
    kinds = {"sliding_attention"} if family.window == "always" else _layer_kinds(config)
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise UserError(f"{where}: layers with and without a sliding window are mixed; set use_sliding_window to false")
    return int(window)


def _layer_kinds(config: Mapping[str, Any]) -> set[str]:
    """What layer_types says, or the older max_window_layers: that many layers come first without a window."""
    if config.get("layer_types"):
        return set(config["layer_types"])
    full = config.get("max_window_layers", 28)
    return {"full_attention" if i < full else "sliding_attention" for i in range(config["num_hidden_layers"])}
