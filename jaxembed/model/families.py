"""Model families: one transformer implements all of them. A family is an entry of `FAMILIES`.

`formats/hf_config.py` reads their configs, `presets.py` lists published sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from jaxembed.model.masks import CAUSAL, Mask


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a transformer, read from a Hugging Face config by `parse_hf_config`.

    Attributes:
        family: Key of `FAMILIES`.
        vocab_size: Vocabulary size V.
        width: Model width D.
        layers: Number of layers L.
        heads: Number of query heads N.
        kv_heads: Number of key-value heads G.
        head_width: Head width H.
        mlp_width: Feed-forward width F.
        activation: Activation of the feed-forward layers, a key of `layers.ACTIVATIONS`.
        gated_mlp: Whether the feed-forward layers are gated (GLU): activation(gate(x)) * up(x).
        mlp_bias: Whether the projections of the feed-forward layers have a bias.
        norm: Kind of all norms (see `layers.make_norm`).
        norm_placement: "pre" norms the input of each block, "both" its input and its output, "post" the sum of the two.
        unnormed_first_layer: Whether the attention of the first layer has no norm before it, as in ModernBERT.
        norm_epsilon: Epsilon of all norms.
        embedding_scale: Factor that token embeddings are multiplied by.
        embedding_norm: Whether a norm follows the embeddings.
        position_kind: "rope" rotates queries and keys; "learned" adds a trained vector to each token.
        position_offset: Row of position 0 in the table of learned positions.
        token_types: Number of token types (segments in BERT). Every token has type 0. 0: there is no table.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Entries of the rotary scaling, sorted by key (see `compute_rope_frequencies`).
        local_rope_theta: Rotary base of layers with a sliding window, without scaling; None: the same as in other layers.
        query_scale: Factor of the attention scores; None: 1 / sqrt(H).
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection of attention has a bias.
        qk_norm: Whether queries and keys are normalized.
        windows: Sliding window of each layer in tokens, as configured; None: no window.
        halves_windows: Whether a bidirectional window reaches half its size to either side, as in Gemma 3 and ModernBERT.
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
    activation: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    norm: Literal["rms", "rms_offset", "layer", "layer_unbiased"] = "rms"
    norm_placement: Literal["pre", "both", "post"] = "pre"
    unnormed_first_layer: bool = False
    norm_epsilon: float = 1e-6
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    position_kind: Literal["rope", "learned"] = "rope"
    position_offset: int = 0
    token_types: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    local_rope_theta: float | None = None
    query_scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    halves_windows: bool = False
    tie_embeddings: bool = False
    max_positions: int = 32_768

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Number of units along each logical axis that a mesh may split (`make_logical_axis_table`)."""
        return {"embed": self.width, "heads": self.heads, "kv_heads": self.kv_heads, "mlp": self.mlp_width}

    def get_windows(self, mask: Mask) -> tuple[int | None, ...]:
        """Return the sliding window of each layer, halved where a bidirectional mask halves it; None for layers without one."""
        windows = self.windows or (None,) * self.layers
        if not self.halves_windows or mask == CAUSAL:
            return windows
        return tuple(window and window // 2 for window in windows)

    def list_distinct_windows(self, mask: Mask) -> tuple[int, ...]:
        """Return the distinct sliding windows. A layer without one counts with the maximum length."""
        return tuple(dict.fromkeys(window or self.max_positions for window in self.get_windows(mask)))


@dataclasses.dataclass(frozen=True)
class Family:
    """Properties of a model family that its config files do not state.

    Attributes:
        architecture: Class name in exported configs. Mistral's is the language model, because llama.cpp converts only that.
        is_encoder: Whether the family is always bidirectional. Its configs do not state a mask.
        mask_field: Config field from which transformers reads the mask of a decoder.
        bidirectional_since: First version of transformers that supports a bidirectional mask; empty for encoders.
        has_offset_positions: Whether learned positions start after the row of the padding token, as in RoBERTa.
        window: When a configured sliding window is used: "always", "never", if `use_sliding_window` is set ("switched"), or in
            all layers but one of each group ("grouped"). `keys["layer_group"]` names the field with the size of a group.
        full_layer: Index, within a group, of the layer without a window.
        options: Fields of `TransformerConfig` that are the same for all models of the family.
        keys: Names of config fields by their names in Llama configs, where they differ.
        defaults: Defaults of config fields in transformers, where they depend on the family.
        refused: Fields of its configs that change vectors, as in `FieldList.refused`.
        modules: Names of modules in checkpoints, by the path of their parameters in our tree ("{i}": the layer). Paths with
            the same name are equal parts of one fused projection, in this order.
    """

    architecture: str
    is_encoder: bool = False
    mask_field: Literal["is_causal", "use_bidirectional_attention"] = "is_causal"
    bidirectional_since: Literal["5.2", "4.57", ""] = "5.2"
    has_offset_positions: bool = False
    window: Literal["always", "switched", "never", "grouped"] = "never"
    full_layer: Literal[0, -1] = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def get_key(self, key: str) -> str:
        """Return the family's name of a config field, given its name in Llama configs."""
        return self.keys.get(key, key)


LAYERS_PATH = "decoder/layers"
LLAMA_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "decoder/embedding": "embed_tokens",
        f"{LAYERS_PATH}/attention/q": "layers.{i}.self_attn.q_proj",
        f"{LAYERS_PATH}/attention/k": "layers.{i}.self_attn.k_proj",
        f"{LAYERS_PATH}/attention/v": "layers.{i}.self_attn.v_proj",
        f"{LAYERS_PATH}/attention/out": "layers.{i}.self_attn.o_proj",
        f"{LAYERS_PATH}/attention/q_norm": "layers.{i}.self_attn.q_norm",
        f"{LAYERS_PATH}/attention/k_norm": "layers.{i}.self_attn.k_norm",
        f"{LAYERS_PATH}/mlp/gate": "layers.{i}.mlp.gate_proj",
        f"{LAYERS_PATH}/mlp/up": "layers.{i}.mlp.up_proj",
        f"{LAYERS_PATH}/mlp/down": "layers.{i}.mlp.down_proj",
        f"{LAYERS_PATH}/attention_norm": "layers.{i}.input_layernorm",
        f"{LAYERS_PATH}/mlp_norm": "layers.{i}.post_attention_layernorm",
        "decoder/norm": "norm",
    }
)
GEMMA_MODULES: Mapping[str, str] = MappingProxyType(
    {
        **LLAMA_MODULES,
        f"{LAYERS_PATH}/attention_out_norm": "layers.{i}.post_attention_layernorm",
        f"{LAYERS_PATH}/mlp_norm": "layers.{i}.pre_feedforward_layernorm",
        f"{LAYERS_PATH}/mlp_out_norm": "layers.{i}.post_feedforward_layernorm",
    }
)
BERT_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "decoder/embedding": "embeddings.word_embeddings",
        "decoder/positions": "embeddings.position_embeddings",
        "decoder/token_types": "embeddings.token_type_embeddings",
        "decoder/embedding_norm": "embeddings.LayerNorm",
        f"{LAYERS_PATH}/attention/q": "encoder.layer.{i}.attention.self.query",
        f"{LAYERS_PATH}/attention/k": "encoder.layer.{i}.attention.self.key",
        f"{LAYERS_PATH}/attention/v": "encoder.layer.{i}.attention.self.value",
        f"{LAYERS_PATH}/attention/out": "encoder.layer.{i}.attention.output.dense",
        f"{LAYERS_PATH}/attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
        f"{LAYERS_PATH}/mlp/up": "encoder.layer.{i}.intermediate.dense",
        f"{LAYERS_PATH}/mlp/down": "encoder.layer.{i}.output.dense",
        f"{LAYERS_PATH}/mlp_norm": "encoder.layer.{i}.output.LayerNorm",
    }
)
MODERNBERT_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "decoder/embedding": "embeddings.tok_embeddings",
        "decoder/embedding_norm": "embeddings.norm",
        f"{LAYERS_PATH}/attention/q": "layers.{i}.attn.Wqkv",
        f"{LAYERS_PATH}/attention/k": "layers.{i}.attn.Wqkv",
        f"{LAYERS_PATH}/attention/v": "layers.{i}.attn.Wqkv",
        f"{LAYERS_PATH}/attention/out": "layers.{i}.attn.Wo",
        f"{LAYERS_PATH}/attention_norm": "layers.{i}.attn_norm",
        f"{LAYERS_PATH}/mlp/gate": "layers.{i}.mlp.Wi",
        f"{LAYERS_PATH}/mlp/up": "layers.{i}.mlp.Wi",
        f"{LAYERS_PATH}/mlp/down": "layers.{i}.mlp.Wo",
        f"{LAYERS_PATH}/mlp_norm": "layers.{i}.mlp_norm",
        "decoder/norm": "final_norm",
    }
)
_BERT = Family(
    architecture="BertModel",
    is_encoder=True,
    bidirectional_since="",
    options={
        "qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated_mlp": False, "norm": "layer", "norm_placement": "post",
        "embedding_norm": True, "position_kind": "learned",
    },
    keys={"rms_norm_eps": "layer_norm_eps"},
    defaults={
        "vocab_size": 30_522, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2,
        "max_position_embeddings": 512, "pad_token_id": 0, "tie_word_embeddings": True,
    },
    refused={"is_decoder": (False,), "position_embedding_type": ("absolute",), "embedding_size": ()},
    modules=BERT_MODULES,
)  # fmt: skip
_ROBERTA = dataclasses.replace(
    _BERT,
    architecture="RobertaModel",
    has_offset_positions=True,
    defaults={**_BERT.defaults, "vocab_size": 50_265, "pad_token_id": 1},
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2": Family(
            architecture="Qwen2Model", window="switched", options={"qkv_bias": True},
            defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768}, modules=LLAMA_MODULES,
        ),
        "qwen3": Family(
            architecture="Qwen3Model", window="switched", options={"qk_norm": True},
            defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768}, modules=LLAMA_MODULES,
        ),
        "mistral": Family(
            architecture="MistralForCausalLM", window="always",
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072}, modules=LLAMA_MODULES,
        ),
        "llama": Family(
            architecture="LlamaModel", defaults={"max_position_embeddings": 2048}, modules=LLAMA_MODULES
        ),
        "gemma3_text": Family(
            architecture="Gemma3TextModel", mask_field="use_bidirectional_attention", bidirectional_since="4.57",
            window="grouped", full_layer=-1,
            options={"norm": "rms_offset", "norm_placement": "both", "qk_norm": True, "halves_windows": True},
            keys={
                "hidden_act": "hidden_activation", "layer_group": "sliding_window_pattern",
                "local_rope_theta": "rope_local_base_freq",
            },
            defaults={
                "vocab_size": 262_208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
                "intermediate_size": 9216, "num_key_value_heads": 4, "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256,
                "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 10_000.0,
                "tie_word_embeddings": True,
            },
            refused={"is_causal": (True,)}, modules=GEMMA_MODULES,
        ),
        "modernbert": Family(
            architecture="ModernBertModel", is_encoder=True, bidirectional_since="", window="grouped",
            options={
                "norm": "layer_unbiased", "embedding_norm": True, "unnormed_first_layer": True, "halves_windows": True,
            },
            keys={
                "hidden_act": "hidden_activation", "rms_norm_eps": "norm_eps", "sliding_window": "local_attention",
                "layer_group": "global_attn_every_n_layers", "rope_theta": "global_rope_theta",
                "local_rope_theta": "local_rope_theta",
            },
            defaults={
                "vocab_size": 50_368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
                "num_attention_heads": 12, "hidden_activation": "gelu", "max_position_embeddings": 8192, "norm_eps": 1e-5,
                "local_attention": 128, "global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0,
                "local_rope_theta": 10_000.0, "tie_word_embeddings": True,
            },
            # transformers sets local_attention to twice the sliding_window, and scales the positions of all layers alike.
            refused={
                "norm_bias": (False,), "position_embedding_type": ("absolute",), "sliding_window": (), "rope_scaling": (),
            },
            modules=MODERNBERT_MODULES,
        ),
        "bert": _BERT,
        "roberta": _ROBERTA,
        "xlm-roberta": dataclasses.replace(
            _ROBERTA, architecture="XLMRobertaModel", defaults={**_ROBERTA.defaults, "vocab_size": 30_522}
        ),
    }
)  # fmt: skip


def find_window_group(transformer: TransformerConfig) -> int | None:
    """Return the size of the groups of layers that have one layer without a window each; None if there are no such groups.

    Args:
        transformer: A transformer of a family whose windows are "grouped".
    """
    full_layer = FAMILIES[transformer.family].full_layer
    for size in range(1, transformer.layers + 2):
        if all((window is None) == (i % size == full_layer % size) for i, window in enumerate(transformer.windows)):
            return size
    return None
