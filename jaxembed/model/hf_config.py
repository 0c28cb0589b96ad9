"""Reading the config.json of a Hugging Face model into a `DecoderConfig`. Every field is read, harmless or refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxembed.config.field_lists import FieldList, log_once
from jaxembed.config.fields import Fields
from jaxembed.errors import UserError
from jaxembed.model.families import FAMILIES, DecoderConfig, Family

# How each field of a decoder's config.json is handled; see `FieldList`.
CONFIG_FIELDS = FieldList(
    read=frozenset(
        {
            "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters",
            "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
            "tie_word_embeddings", "max_position_embeddings", "is_causal", "use_bidirectional_attention", "auto_map",
            "matryoshka_dimensions",
        }
    ),
    # Fields on generation, training, class names, and how PyTorch computes.
    harmless=frozenset(
        {
            "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
            "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "output_attentions",
            "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version",
            "use_cache", "attn_implementation", "num_labels", "classifier_dropout", "sentence_transformers", "unsloth_version",
            "unsloth_fixed", "gradient_checkpointing", "layer_norm_eps", "hidden_dropout", "embd_pdrop", "resid_pdrop",
            "torchscript", "task_specific_params", "tokenizer_class", "return_dict_in_generate", "prefix", "use_bfloat16",
            "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty",
            "output_scores", "finetuning_task", "sep_token_id", "cls_token_id", "mask_token_id", "use_return_dict",
            "tie_encoder_decoder", "is_decoder",
            "diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size", "length_penalty", "no_repeat_ngram_size",
            "num_beam_groups", "num_return_sequences", "remove_invalid_values", "tf_legacy_loss", "typical_p",
        }
    ),
    # Field: the values with which it has no effect. Any other value is refused.
    refused={
        "partial_rotary_factor": (1, 1.0), "pretraining_tp": (1,), "quantization_config": (), "cross_attention_hidden_size": (),
        "add_cross_attention": (False,), "pruned_heads": (), "is_bidirectional": (),
        "attn_logit_softcapping": (), "embedding_multiplier": (1, 1.0), "residual_multiplier": (1, 1.0),
        "attention_multiplier": (),
    },
)  # fmt: skip

# Any of these keys in a config marks a mixture of experts.
MOE_KEYS = frozenset({"num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"})

# Scaling parameters that each supported `rope_type` needs.
ROPE_SCALING_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
)
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")  # allowed with every `rope_type`
# Limits far above any model, so that a wrong config is refused before memory is allocated.
MAX_LAYERS = MAX_HEADS = MAX_HEAD_WIDTH = 2**12
MAX_WIDTH = MAX_VOCAB_SIZE = 2**24


def parse_hf_config(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read the sizes of a decoder from a Hugging Face config.

    Args:
        config: Content of a config.json.
        where: Its path, for errors.

    Raises:
        UserError: The family or a feature is not supported, or a value is missing or invalid.
    """
    family = _find_family(config, where)
    CONFIG_FIELDS.check(config, where)
    _check_mask(config, where)
    config = {**family.defaults, **config}
    fields = Fields(config, where)
    if config.get("hidden_act", "silu") != "silu" or fields.boolean("mlp_bias"):
        raise UserError(
            f"{where}: the feed-forward layers are not supported (found hidden_act {config.get('hidden_act', 'silu')!r:.60} "
            f"and mlp_bias {fields.boolean('mlp_bias')}; expected hidden_act silu and no mlp_bias). Use another base."
        )
    rope = _read_rope(config, where)
    heads, kv_heads, head_width = _read_heads(config, where)
    return DecoderConfig(
        family=str(config["model_type"]),
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
        width=fields.integer("hidden_size", maximum=MAX_WIDTH),
        layers=fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=fields.integer("intermediate_size", maximum=MAX_WIDTH),
        norm_epsilon=fields.positive_number("rms_norm_eps", 1e-6),
        rope_theta=rope.pop("rope_theta"),
        rope_scaling=tuple(sorted(rope.items())),
        qkv_bias=family.qkv_bias or fields.boolean("attention_bias"),
        out_bias=fields.boolean("attention_bias"),
        qk_norm=family.qk_norm,
        windows=_read_windows(config, family, where),
        tie_embeddings=fields.boolean("tie_word_embeddings"),
        max_positions=fields.integer("max_position_embeddings"),
    )


def _check_mask(config: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` if the two fields of the mask contradict each other. Libraries differ in which one they read."""
    fields = Fields(config, where)
    if config.get("use_bidirectional_attention") is None:
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
    raise UserError(
        f"{where}: model_type {kind} is not supported (expected {', '.join(FAMILIES)} or nvembed). Use another base."
    )


def _read_heads(config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
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
    if head_width % 2:
        raise UserError(f"{where}: the head width is {head_width} (expected an even number, for rotary positions). Correct it.")
    return heads, kv_heads, head_width


def _read_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a dict of `rope_type`, `rope_theta` and the scaling parameters of that type.

    They are in `rope_parameters` (transformers 5), or in `rope_scaling` with `rope_theta` beside it (older versions). If a
    config has both, they must agree, because libraries differ in which one they read.
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
    """Read and check one of the two fields, `key`. Returns the same dict as `_read_rope`."""
    rope = Fields(config, where).mapping(key, {})
    fields = Fields(rope, f"{where}: {key}")
    kind = fields.string("rope_type", fields.string("type", "default"))
    if kind not in ROPE_SCALING_KEYS:
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported (expected {' or '.join(ROPE_SCALING_KEYS)}). Use another base."
        )
    if nested := sorted(name for name, value in rope.items() if isinstance(value, Mapping)):
        raise UserError(f"{where}: {key}: rotary positions by kind of layer are not supported ({nested[0]}). Use another base.")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{where}: {key}: partial_rotary_factor is not supported (expected 1). Use another base.")
    if unread := sorted(rope.keys() - {*ROPE_KEYS, *ROPE_SCALING_KEYS[kind]}):
        log_once(
            f"{where}: {key}: {', '.join(unread)[:200]} of rope_type {kind} {'is' if len(unread) == 1 else 'are'} not read"
        )
    if rope.get("rope_theta") is not None and config.get("rope_theta") not in (None, rope["rope_theta"]):
        log_once(f"{where}: rope_theta beside {key} is not read, as in transformers: {key} has another one")
    theta = fields.positive_number("rope_theta", Fields(config, where).positive_number("rope_theta", 10_000.0))
    numbers = {name: fields.positive_number(name) for name in ROPE_SCALING_KEYS[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(
            f"{where}: {key}: high_freq_factor is not above low_freq_factor (found {numbers['high_freq_factor']} and "
            f"{numbers['low_freq_factor']}). Correct them."
        )
    return {"rope_type": kind, "rope_theta": theta, **numbers}


def _read_windows(config: Mapping[str, Any], family: Family, where: str) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, with None for layers without one."""
    fields = Fields(config, where)
    layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    is_off = family.window == "never" or (family.window == "switched" and not fields.boolean("use_sliding_window"))
    if is_off or config.get("sliding_window", 4096) is None:
        return (None,) * layers
    window = fields.integer("sliding_window", 4096)
    kinds = ["sliding_attention"] * layers if family.window == "always" else _read_layer_types(config, layers, where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read_layer_types(config: Mapping[str, Any], layers: int, where: str) -> list[str]:
    """Return the attention type of each layer.

    Newer configs list them in `layer_types`. Older ones have `max_window_layers`: that many first layers have full attention,
    the others a sliding window.
    """
    layer_types = config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if not layer_types:
        full_layers = Fields(config, where).integer("max_window_layers", 28, minimum=0)
        return [known[i >= full_layers] for i in range(layers)]
    if not isinstance(layer_types, list) or len(layer_types) < layers or any(kind not in known for kind in layer_types):
        raise UserError(
            f"{where}: layer_types is invalid (expected a list of {layers}, each {' or '.join(known)}). Correct it."
        )
    return layer_types[:layers]
