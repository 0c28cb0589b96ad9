"""One decoder serves every family; a family is a row in FAMILIES, a published size a row in PRESETS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from jaxembed.config.fields import Fields
from jaxembed.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder, in the terms of Hugging Face configs (see `from_hf`). `windows`: of each layer, None for no limit."""

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
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    max_positions: int = 32_768

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The logical axes of parameters that a mesh may split (`logical_axis_table`), and into how many at most."""
        return {"embed": self.width, "heads": self.heads, "kv_heads": self.kv_heads, "mlp": self.mlp_width}


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

EXPERTS = frozenset({"num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"})

# The numbers that each kind of rotary positions needs.
ROPE_NUMBERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
)
MOST, WIDEST = 2**12, 2**24  # layers or heads; numbers in a vector, entries of a vocabulary: far above any model's

_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32_768}
_QWEN2_SMALL = {
    **_QWEN2, "vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 40_960,
}  # fmt: skip
_MISTRAL = {
    "model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336, "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0, "max_position_embeddings": 32_768, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # For training from scratch. In Qwen3's form, since transformers puts its own tokenizer on qwen2 folders.
        "tiny": {
            **_QWEN2, "model_type": "qwen3", "head_dim": 64, "vocab_size": 8192, "hidden_size": 256,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256,
            "tie_word_embeddings": True,
        },
        "qwen2-0.5b": _QWEN2_SMALL,
        "qwen2-1.5b": {
            **_QWEN2, "vocab_size": 151_936, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "intermediate_size": 8960, "tie_word_embeddings": True,
        },
        "qwen2-7b": {
            **_QWEN2, "vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "intermediate_size": 18_944, "tie_word_embeddings": False,
        },
        "qwen3-0.6b": {
            **_QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072,
            "tie_word_embeddings": True,
        },
        "qwen3-4b": {
            **_QWEN3, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728,
            "tie_word_embeddings": True,
        },
        "qwen3-8b": {
            **_QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12_288,
            "tie_word_embeddings": False,
        },
        "mistral-7b": _MISTRAL,
        "llama3-8b": {
            "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336, "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
        "nv-embed": {"model_type": "nvembed", "text_config": _MISTRAL, "latent_attention_config": {}},
        "kalm-embedding-v2": _QWEN2_SMALL,
    }
)  # fmt: skip


def preset(name: str) -> Mapping[str, Any]:
    """The Hugging Face config of a preset, or `UserError` listing the known ones."""
    if name not in PRESETS:
        raise UserError(f"model.base preset:{name} is unknown; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def from_hf(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Reads a Hugging Face config (`where` names its origin).

    `UserError` on a family or feature not supported, and on a value that is missing or makes no sense.
    """
    fields = Fields(config, where)
    kind = str(config.get("model_type"))[:60]
    if kind not in FAMILIES:
        experts = sorted(config.keys() & EXPERTS)
        if experts:
            raise UserError(
                f"{where}: {kind} is a mixture of experts ({experts[0]}), which is not supported; take a dense base"
            )
        raise UserError(f"{where}: model_type {kind} is not supported; supported: {', '.join(FAMILIES)}, and nvembed")
    if config.get("hidden_act", "silu") != "silu" or fields.flag("mlp_bias"):
        raise UserError(f"{where}: only silu feed-forward layers without bias are supported")
    family = FAMILIES[kind]
    rope = _rope(config, where)
    heads, kv_heads, head_width = _heads(config, where)
    return DecoderConfig(
        family=kind,
        vocab_size=fields.whole("vocab_size", most=WIDEST),
        width=fields.whole("hidden_size", most=WIDEST),
        layers=fields.whole("num_hidden_layers", most=MOST),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=fields.whole("intermediate_size", most=WIDEST),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope.pop("rope_theta"),
        rope_scaling=tuple(sorted(rope.items())),
        qkv_bias=family.qkv_bias or fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        qk_norm=family.qk_norm,
        windows=_windows(config, family, where),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        max_positions=fields.whole("max_position_embeddings", 32_768),
    )


def _heads(config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """Query heads, key-value heads and the width of a head, which fit each other."""
    fields = Fields(config, where)
    heads, width = fields.whole("num_attention_heads", most=MOST), fields.whole("hidden_size", most=WIDEST)
    kv_heads = fields.whole("num_key_value_heads", heads, most=MOST)
    if config.get("head_dim") is None and width % heads:
        raise UserError(f"{where}: hidden_size {width} is not divisible by num_attention_heads {heads}")
    head_width = fields.whole("head_dim", width // heads, most=MOST)
    if heads % kv_heads:
        raise UserError(f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
    if head_width % 2:
        raise UserError(f"{where}: heads are {head_width} wide; expected an even width, for rotary positions")
    return heads, kv_heads, head_width


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and the scaling's entries, from the new form (rope_parameters) or the old one."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = Fields(config, where).mapping(key, {})
    fields = Fields(rope, f"{where}: {key}")
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind not in ROPE_NUMBERS:
        raise UserError(f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_NUMBERS)}")
    theta = fields.number("rope_theta", Fields(config, where).number("rope_theta", 10_000.0))
    numbers = {name: fields.number(name) for name in ROPE_NUMBERS[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(f"{where}: {key}: high_freq_factor must be above low_freq_factor")
    return {"rope_type": kind, "rope_theta": theta, **numbers}


def _windows(config: Mapping[str, Any], family: Family, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer, None where it sees everything."""
    fields = Fields(config, where)
    layers = fields.whole("num_hidden_layers", most=MOST)
    off = family.window == "never" or (family.window == "switched" and not fields.flag("use_sliding_window"))
    if off or config.get("sliding_window", 4096) is None:
        return (None,) * layers
    window = fields.whole("sliding_window", 4096)
    kinds = ["sliding_attention"] * layers if family.window == "always" else _layer_kinds(config, layers, where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_kinds(config: Mapping[str, Any], layers: int, where: str) -> list[str]:
    """What layer_types says, or the older max_window_layers: that many layers come first without a window."""
    named = config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if not named:
        full = Fields(config, where).whole("max_window_layers", 28, least=0)
        return [known[i >= full] for i in range(layers)]
    if not isinstance(named, list) or len(named) < layers or any(kind not in known for kind in named):
        raise UserError(f"{where}: layer_types must be a list of {layers}, one a layer, each one of {', '.join(known)}")
    return named[:layers]
