"""Model families: one transformer serves all of them. A family is a row of `FAMILIES`.

`hf_config.py` reads their configs, `presets.py` lists published sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder, read from a Hugging Face config by `hf_config.parse_hf_config`.

    Attributes:
        family: Key of `FAMILIES`.
        vocab_size: Vocabulary size V.
        width: Model width D.
        layers: Number of layers L.
        heads: Number of query heads N.
        kv_heads: Number of key-value heads G.
        head_width: Head width H.
        mlp_width: Feed-forward width F.
        norm_epsilon: Epsilon of all norms.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Sorted entries of the rotary scaling (see `compute_rope_frequencies`).
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection of attention has a bias.
        qk_norm: Whether queries and keys pass a norm.
        windows: Sliding window of each layer in tokens; None: no window.
        tie_embeddings: Whether the language-model head uses the token embedding as its kernel.
        max_positions: Maximum length of a text in tokens.
    """

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
        """The logical axes that a mesh may split (`logical_axis_table`), each with the number of parts it can be split into."""
        return {"embed": self.width, "heads": self.heads, "kv_heads": self.kv_heads, "mlp": self.mlp_width}


@dataclasses.dataclass(frozen=True)
class Family:
    """Properties of a model family that its config files do not state.

    Attributes:
        qkv_bias: Whether the query, key and value projections always have a bias.
        qk_norm: Whether queries and keys pass a norm.
        window: When a configured sliding window is used: "always", if `use_sliding_window` is set ("switched"), or "never".
        architecture: Class name that exported configs state. The converter of llama.cpp knows Mistral only as a language model.
        defaults: Defaults of config fields, where transformers has different defaults for different families.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["always", "switched", "never"] = "never"
    architecture: str = ""
    defaults: Mapping[str, int] = dataclasses.field(default_factory=dict)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2": Family(
            qkv_bias=True, window="switched", architecture="Qwen2Model",
            defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
        ),
        "qwen3": Family(
            qk_norm=True, window="switched", architecture="Qwen3Model",
            defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
        ),
        "mistral": Family(
            window="always", architecture="MistralForCausalLM",
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072},
        ),
        "llama": Family(architecture="LlamaModel", defaults={"max_position_embeddings": 2048}),
    }
)  # fmt: skip
