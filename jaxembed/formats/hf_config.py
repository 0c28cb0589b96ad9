"""Parse the config.json of a Hugging Face model into a `TransformerConfig`. Every field is read, harmless, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxembed.config.field_lists import FieldList, log_once
from jaxembed.config.fields import Fields, quote_value
from jaxembed.errors import UserError
from jaxembed.model.families import FAMILIES, Family, TransformerConfig

# How each field of a config.json is handled; see `FieldList`.
CONFIG_FIELDS = FieldList(
    read=frozenset(
        {
            "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters",
            "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
            "tie_word_embeddings", "max_position_embeddings", "is_causal", "use_bidirectional_attention", "auto_map",
            "matryoshka_dimensions", "layer_norm_eps", "type_vocab_size", "pad_token_id", "hidden_activation",
            "sliding_window_pattern", "rope_local_base_freq", "query_pre_attn_scalar", "norm_eps", "local_attention",
            "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "original_max_position_embeddings",
        }
    ),
    # Fields on generation, training, class names, and how PyTorch computes.
    harmless=frozenset(
        {
            "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
            "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "output_attentions",
            "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
            "use_cache", "attn_implementation", "num_labels", "classifier_dropout", "sentence_transformers", "unsloth_version",
            "unsloth_fixed", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
             "embd_pdrop", "resid_pdrop",
            "torchscript", "task_specific_params", "tokenizer_class", "return_dict_in_generate", "prefix", "use_bfloat16",
            "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty",
            "output_scores", "finetuning_task", "sep_token_id", "cls_token_id", "mask_token_id", "use_return_dict",
            "tie_encoder_decoder", "is_decoder",
            "initializer_cutoff_factor", "embedding_dropout", "mlp_dropout", "decoder_bias", "classifier_pooling",
            "classifier_bias", "classifier_activation", "deterministic_flash_attn", "sparse_prediction",
            "sparse_pred_ignore_index", "repad_logits_with_grad", "reference_compile", "final_logit_softcapping",
            "cache_implementation", "_sliding_window_pattern",
            "diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size", "length_penalty", "no_repeat_ngram_size",
            "num_beam_groups", "num_return_sequences", "remove_invalid_values", "tf_legacy_loss", "typical_p",
            "allow_global_per_layer_attribute_access", "experts_implementation", "name_or_path",
            "serialize_explicit_per_layer_config",
        }
    ),
    # Field: the values that have no effect. Any other value is refused.
    refused={
        "partial_rotary_factor": (1, 1.0), "pretraining_tp": (1,), "quantization_config": (), "cross_attention_hidden_size": (),
        "add_cross_attention": (False,), "pruned_heads": (), "is_bidirectional": (),
        "attn_logit_softcapping": (), "embedding_multiplier": (1, 1.0), "residual_multiplier": (1, 1.0),
        "attention_multiplier": (), "per_layer_config": (),
    },
)  # fmt: skip

# Key of `layers.ACTIVATIONS` for each name in configs.
ACTIVATION_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
)  # fmt: skip
# Any of these keys in a config marks a mixture of experts.
MOE_KEYS = frozenset({"num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"})

# What our transformer lacks to support a family, by `model_type`. Completes "because it needs ...".
MISSING_FEATURES: Mapping[str, str] = MappingProxyType(
    {
        "albert": "weights shared between layers",
        "deberta": "disentangled attention",
        "deberta-v2": "disentangled attention",
        "gemma2": "soft-capped attention scores",
        "gemma3": "image inputs (its text_config alone is a gemma3_text)",
        "ministral3": "queries scaled by their position",
        "mpnet": "relative position biases",
        "phi3": "rotary frequencies that depend on the length of the text (LongRoPE)",
        "t5": "relative position biases",
    }
)
ORIGINAL_LENGTH = "original_max_position_embeddings"  # maximum tokens of a text before the positions were scaled
# Scaling parameters that each supported `rope_type` needs.
ROPE_SCALING_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH),
        "yarn": ("factor", ORIGINAL_LENGTH),
    }
)
# Optional scaling parameters of a `rope_type`.
OPTIONAL_ROPE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
)
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")  # allowed with every `rope_type`
# Limits far above any model, so that a wrong config is refused before memory is allocated.
MAX_LAYERS = MAX_HEADS = MAX_HEAD_WIDTH = 2**12
MAX_WIDTH = MAX_VOCAB_SIZE = 2**24


def parse_hf_config(config: Mapping[str, Any], where: str) -> TransformerConfig:
    """Return the sizes and options of a transformer, read from a Hugging Face config.

    Args:
        config: Content of a config.json.
        where: Its path, for errors.

    Raises:
        UserError: The family or a feature is not supported, or a value is missing or invalid.
    """
    family = _find_family(config, where)
    get_config_fields(family).check(config, where)
    _check_mask(config, family, where)
    config = {**family.defaults, **config}
    fields = Fields(config, where)
    heads, kv_heads, head_width = _read_heads(config, family, where)
    values = {
        "family": str(config["model_type"]),
        "vocab_size": fields.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
        "width": fields.integer("hidden_size", maximum=MAX_WIDTH),
        "layers": fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": head_width,
        "mlp_width": fields.integer("intermediate_size", maximum=MAX_WIDTH),
        "activation": _read_activation(config, family, where),
        "mlp_bias": fields.boolean("mlp_bias"),
        "norm_epsilon": fields.positive_number(family.get_key("rms_norm_eps"), 1e-6),
        "qkv_bias": fields.boolean("attention_bias"),
        "out_bias": fields.boolean("attention_bias"),
        "windows": _read_windows(config, family, where),
        "tie_embeddings": fields.boolean("tie_word_embeddings"),
        **_read_positions(config, family, where),
        **_read_scales(config, family, where),
    }
    return TransformerConfig(**{**values, **family.options})


def get_config_fields(family: Family) -> FieldList:
    """Return how each field of a family's configs is handled."""
    return dataclasses.replace(CONFIG_FIELDS, refused={**CONFIG_FIELDS.refused, **family.refused})


def _read_scales(config: Mapping[str, Any], family: Family, where: str) -> dict[str, float]:
    """Return the `TransformerConfig` fields for the scales of embeddings and attention scores, which only Gemma sets."""
    if "query_pre_attn_scalar" not in family.defaults:
        return {}
    fields = Fields(config, where)
    scores = fields.positive_number("query_pre_attn_scalar") ** -0.5
    return {"embedding_scale": fields.integer("hidden_size", maximum=MAX_WIDTH) ** 0.5, "query_scale": scores}


def _read_activation(config: Mapping[str, Any], family: Family, where: str) -> str:
    """Return the key of `ACTIVATIONS` for the activation in a config."""
    key = family.get_key("hidden_act")
    name = Fields(config, where).string(key, "silu")
    if name not in ACTIVATION_NAMES:
        raise UserError(
            f"{where}: {key} {name[:60]!r} is not supported (expected {', '.join(ACTIVATION_NAMES)}). Use another base."
        )
    return ACTIVATION_NAMES[name]


def _read_positions(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the `TransformerConfig` fields for positions and token types."""
    fields = Fields(config, where)
    positions = fields.integer("max_position_embeddings")
    if family.options.get("position_kind") != "learned":
        local_theta = _read_local_theta(config, family, where)
        rope = _read_rope(_select_full_rope(config, family, where), where)
        theta = rope.pop("rope_theta")
        scaling = tuple(sorted(rope.items()))
        return {"max_positions": positions, "rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}
    # Position 0 has row 0 in BERT, and the row after the padding token's in RoBERTa.
    offset = 1 + fields.integer("pad_token_id", minimum=0) if family.has_offset_positions else 0
    if positions <= offset:
        raise UserError(
            f"{where}: max_position_embeddings {positions} leaves no position after that of pad_token_id, {offset - 1}. "
            "Correct one of them."
        )
    token_types = fields.integer("type_vocab_size", minimum=0, maximum=MAX_VOCAB_SIZE)
    return {"max_positions": positions - offset, "position_offset": offset, "token_types": token_types}


def _check_mask(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Raise `UserError` if the fields that state the mask contradict each other, or libraries read them differently."""
    fields = Fields(config, where)
    if config.get("is_causal", True) is None and not family.is_encoder:
        raise UserError(
            f"{where}: is_causal is null, which transformers takes for false and other libraries for true. Set one of them."
        )
    if family.mask_field != "is_causal" or config.get("use_bidirectional_attention") is None:
        return
    is_causal, is_bidirectional = fields.boolean("is_causal", True), fields.boolean("use_bidirectional_attention")
    if is_causal == is_bidirectional:
        value = str(is_causal).lower()
        raise UserError(
            f"{where}: use_bidirectional_attention {value} is not supported with is_causal {value} (expected the opposite). "
            "Correct the one that does not belong to the weights."
        )


def _find_family(config: Mapping[str, Any], where: str) -> Family:
    """Return the family that `model_type` names."""
    kind = str(config.get("model_type"))[:60]
    if kind in FAMILIES:
        return FAMILIES[kind]
    moe_keys = sorted(config.keys() & MOE_KEYS)
    if moe_keys:
        raise UserError(f"{where}: {kind} is a mixture of experts ({moe_keys[0]}), which is not supported. Use a dense base.")
    missing = f", because it needs {MISSING_FEATURES[kind]}" if kind in MISSING_FEATURES else ""
    raise UserError(
        f"{where}: model_type {kind} is not supported{missing} (expected {', '.join(FAMILIES)} or nvembed). Use another base."
    )


def _select_full_rope(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the config with the rotary settings of full-attention layers under the keys of Llama configs."""
    if "local_rope_theta" not in family.keys:
        return dict(config)
    ropes = config.get("rope_parameters") or {}
    theta = Fields(config, where).positive_number(family.get_key("rope_theta"))
    return {**config, "rope_parameters": ropes.get("full_attention"), "rope_theta": theta}


def _read_local_theta(config: Mapping[str, Any], family: Family, where: str) -> float | None:
    """Return the rotary base of layers with a sliding window; None if all layers have the same base."""
    if "local_rope_theta" not in family.keys:
        return None
    key = family.keys["local_rope_theta"]
    ropes = Fields(config, where).mapping("rope_parameters", {})
    if unknown := sorted(ropes.keys() - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"{where}: rope_parameters has {unknown[0]} (expected full_attention and sliding_attention). Correct it."
        )
    local = Fields(ropes, f"{where}: rope_parameters").mapping("sliding_attention", {})
    fields = Fields(local, f"{where}: rope_parameters: sliding_attention")
    fields.choice("rope_type", ("default",), fields.string("type", "default"))
    return fields.positive_number("rope_theta", Fields(config, where).positive_number(key))


def _read_heads(config: Mapping[str, Any], family: Family, where: str) -> tuple[int, int, int]:
    """Return the number of query heads, the number of key-value heads and the head width, checked against each other."""
    fields = Fields(config, where)
    heads = fields.integer("num_attention_heads", maximum=MAX_HEADS)
    width = fields.integer("hidden_size", maximum=MAX_WIDTH)
    kv_heads = fields.integer("num_key_value_heads", heads, maximum=MAX_HEADS)
    if config.get("head_dim") is None and width % heads:
        raise UserError(f"{where}: hidden_size {width} is not divisible by num_attention_heads {heads}. Set head_dim.")
    head_width = fields.integer("head_dim", width // heads, maximum=MAX_HEAD_WIDTH)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}. Correct one of them."
        )
    if head_width % 2 and family.options.get("position_kind") != "learned":
        raise UserError(f"{where}: the head width is {head_width} (expected an even number, for rotary positions). Correct it.")
    return heads, kv_heads, head_width


def _read_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and the scaling parameters of that type.

    Configs have them in `rope_parameters` (transformers 5), or in `rope_scaling` with `rope_theta` beside it (older versions).
    If a config has both, they must agree, because libraries differ in which one they read.
    """
    keys = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    ropes = [_parse_rope(config, key, where) for key in keys or ["rope_scaling"]]
    if ropes[0] != ropes[-1]:
        raise UserError(
            f"{where}: rope_parameters and rope_scaling contradict each other ({ropes[0]['rope_type']} and "
            f"{ropes[-1]['rope_type']}; expected the same in both, or one of them). Remove the one that does not belong to the "
            "weights."
        )
    return ropes[0]


def _parse_rope(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return what `_read_rope` returns, read from the field `key` alone."""
    # The type of the scaling.
    rope = Fields(config, where).mapping(key, {})
    fields = Fields(rope, f"{where}: {key}")
    kind = fields.string("rope_type", fields.string("type", "default"))
    if kind not in ROPE_SCALING_KEYS:
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported (expected {' or '.join(ROPE_SCALING_KEYS)}). Use another base."
        )
    # Refuse what the transformer cannot compute, and report what is not read.
    if nested_keys := sorted(name for name, value in rope.items() if isinstance(value, Mapping)):
        raise UserError(
            f"{where}: {key}: rotary positions by kind of layer are not supported ({nested_keys[0]}). Use another base."
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{where}: {key}: partial_rotary_factor is not supported (expected 1). Use another base.")
    scaling_keys, optional_keys = ROPE_SCALING_KEYS[kind], OPTIONAL_ROPE_KEYS.get(kind, ())
    switches = ("truncate",) if kind == "yarn" else ()
    if unread := sorted(rope.keys() - {*ROPE_KEYS, *scaling_keys, *optional_keys, *switches}):
        log_once(
            f"{where}: {key}: {', '.join(unread)[:200]} of rope_type {kind} {'is' if len(unread) == 1 else 'are'} not read"
        )
    if rope.get("rope_theta") is not None and config.get("rope_theta") not in (None, rope["rope_theta"]):
        log_once(f"{where}: rope_theta beside {key} is not read, as in transformers: {key} has another value")
    # The base and the parameters of the scaling.
    theta = fields.positive_number("rope_theta", Fields(config, where).positive_number("rope_theta", 10_000.0))
    defaults = {ORIGINAL_LENGTH: config.get("max_position_embeddings")} if kind == "yarn" else {}
    if ORIGINAL_LENGTH in scaling_keys and config.get(ORIGINAL_LENGTH) is not None:
        defaults = {ORIGINAL_LENGTH: _read_outer_length(config, rope, key, where)}
    numbers = {name: fields.positive_number(name, defaults.get(name)) for name in scaling_keys}
    numbers |= {name: fields.positive_number(name) for name in optional_keys if rope.get(name) is not None}
    flags = {name: False for name in switches if not fields.boolean(name, True)}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(
            f"{where}: {key}: high_freq_factor is not above low_freq_factor (found {numbers['high_freq_factor']} and "
            f"{numbers['low_freq_factor']}). Correct them."
        )
    return {"rope_type": kind, "rope_theta": theta, **numbers, **flags}


def _read_outer_length(config: Mapping[str, Any], rope: Mapping[str, Any], key: str, where: str) -> float:
    """Return the length before scaling that the config has outside `rope`, the value of its field `key`.

    transformers 5 prefers it to the one in `rope`, and older versions do not read it, so the two must agree.
    """
    length = Fields(config, where).positive_number(ORIGINAL_LENGTH)
    if rope.get(ORIGINAL_LENGTH) not in (None, length):
        raise UserError(
            f"{where}: {ORIGINAL_LENGTH} is {length:g}, and in {key} {quote_value(rope[ORIGINAL_LENGTH])} (expected the same "
            "in both, or one of them). Remove the one that does not belong to the weights."
        )
    return length


def _read_windows(config: Mapping[str, Any], family: Family, where: str) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, with None for layers without one."""
    fields = Fields(config, where)
    layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    _check_layer_types(config, layers, where)
    if family.window == "grouped":
        return _read_grouped_windows(config, family, where)
    is_off = family.window == "never" or (family.window == "switched" and not fields.boolean("use_sliding_window"))
    if is_off or config.get("sliding_window", 4096) is None:
        return (None,) * layers
    window = fields.integer("sliding_window", 4096)
    kinds = ["sliding_attention"] * layers if family.window == "always" else _read_layer_types(config, layers, where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read_grouped_windows(config: Mapping[str, Any], family: Family, where: str) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, with None for one layer of each group."""
    fields = Fields(config, where)
    layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    minimum = 2 if family.options.get("halves_windows") else 1  # half of 1 would be no window
    window = fields.integer(family.get_key("sliding_window"), minimum=minimum)
    group = fields.integer(family.get_key("layer_group"))
    kinds = [LAYER_TYPES[i % group != family.full_layer % group] for i in range(layers)]
    if config.get("layer_types"):
        kinds = _read_layer_types(config, layers, where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _check_layer_types(config: Mapping[str, Any], layers: int, where: str) -> None:
    """Raise `UserError` if `layer_types` is not a list with a known entry for each layer, which transformers refuses too."""
    kinds = config.get("layer_types")
    if kinds and not (isinstance(kinds, list) and len(kinds) == layers and all(kind in LAYER_TYPES for kind in kinds)):
        raise UserError(
            f"{where}: layer_types is invalid (found {quote_value(kinds)}; expected a list of {layers}, each "
            f"{' or '.join(LAYER_TYPES)}). Correct it."
        )


def _read_layer_types(config: Mapping[str, Any], layers: int, where: str) -> list[str]:
    """Return the attention type of each layer.

    Newer configs list them in `layer_types`. Older ones have `max_window_layers`: the first layers, this many, have full
    attention, and the others a sliding window.
    """
    if layer_types := config.get("layer_types"):
        return list(layer_types)
    full_layers = Fields(config, where).integer("max_window_layers", 28, minimum=0)
    return [LAYER_TYPES[i >= full_layers] for i in range(layers)]
