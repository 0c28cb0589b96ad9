"""Build the JSON files of a stock folder for all readers: transformers, sentence-transformers, vLLM, TEI and llama.cpp.

Readers expect the same values under different keys. Every key that some reader needs is written, unless another reader
refuses it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from jaxembed.config.model import PoolingKind
from jaxembed.config.spec import EmbeddingSpec, HiddenProjection
from jaxembed.formats.sentence_transformers import POOLING_FLAGS, POOLING_MODES, TOKEN_POOLING_TYPE
from jaxembed.model.families import FAMILIES, TransformerConfig, find_window_group

# Types that every sentence-transformers resolves: versions 3 to 5.3 have these modules, newer ones map them to new paths. vLLM
# and TEI compare them literally.
MODULE_TYPE = "sentence_transformers.models.{}"
ACTIVATION_CLASSES = {"identity": "torch.nn.modules.linear.Identity", "tanh": "torch.nn.modules.activation.Tanh"}
POOLING_FLAG_ORDER: tuple[PoolingKind, ...] = ("first", "mean", "max", "weighted_mean", "last")
SERVED_POOLINGS: frozenset[PoolingKind] = frozenset({"mean", "last", "first"})  # that vLLM and llama.cpp compute
# End of the class name of a model that only sentence-transformers computes right. vLLM and llama.cpp look a model up by its
# class name, so they refuse it. With a name they know, vLLM would pool the last token. Other readers go by `model_type`.
OWN_POOLING_SUFFIX = "WithOwnPooling"
REQUIREMENT_REASON = "Earlier versions ignore the field of the mask and would compute other vectors, with a causal mask."
# Fields of a base's config.json that do not belong to the exported model.
UNSAVED_CONFIG_KEYS = (
    "torch_dtype", "auto_map", "_name_or_path", "tokenizer_class", "matryoshka_dimensions", "rope_scaling", "rope_parameters",
    "_sliding_window_pattern", "global_attn_every_n_layers",
)  # fmt: skip
# Keys in which TEI and older readers find the size of a group of layers, one of which has no sliding window.
WINDOW_GROUP_KEYS = {"gemma3_text": "_sliding_window_pattern", "modernbert": "global_attn_every_n_layers"}

MODEL_INPUTS = ("input_ids", "attention_mask")
LOADING_KEYS = ("is_local", "local_files_only")  # fields of a saved tokenizer_config.json that say how it was loaded


def build_config(
    hf_config: Mapping[str, Any], spec: EmbeddingSpec, transformer: TransformerConfig, tokenizer: Any, dtype: str
) -> dict[str, Any]:
    """Return config.json: that of the base, with the model's mask and special tokens, for old and new readers.

    Args:
        hf_config: Hugging Face config of the base.
        spec: Spec of the model.
        transformer: The transformer that `hf_config` describes.
        tokenizer: Fast Hugging Face tokenizer of the model.
        dtype: Dtype of the weights.
    """
    family = FAMILIES[transformer.family]
    config = {key: value for key, value in hf_config.items() if key not in UNSAVED_CONFIG_KEYS} | {
        "architectures": [family.architecture + ("" if spec.pooling in SERVED_POOLINGS else OWN_POOLING_SUFFIX)],
        "dtype": dtype,
        # vLLM needs it for RoBERTa and XLM-R. transformers 5 does not write it.
        **({"position_embedding_type": "absolute"} if transformer.position_kind == "learned" else {}),
        # The padding token of an encoder says where its positions start. Its class determines the mask.
        **(build_rope_fields(transformer) if family.is_encoder else _build_decoder_fields(spec, transformer, tokenizer)),
    }
    if spec.matryoshka_dims:
        config["matryoshka_dimensions"] = sorted({*spec.matryoshka_dims, spec.projection or transformer.width})
    return config


def _build_decoder_fields(spec: EmbeddingSpec, transformer: TransformerConfig, tokenizer: Any) -> dict[str, Any]:
    """Return the fields of mask, heads, special tokens and rotary positions."""
    is_causal, family = spec.attention == "causal", FAMILIES[transformer.family]
    return {
        # transformers, vLLM, and TEI's Qwen2. Where transformers has another field, this one would widen the windows.
        **({"is_causal": is_causal} if family.mask_field == "is_causal" else {}),
        "use_bidirectional_attention": not is_causal,  # TEI's other families
        "head_dim": transformer.head_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **build_rope_fields(transformer),
    }


def build_rope_fields(transformer: TransformerConfig) -> dict[str, Any]:
    """Return the rotary positions as transformers 5 reads them (`rope_parameters`), and also as older readers do.

    Without `rope_theta` at the top, transformers 4 uses 10,000. Without `rope_scaling`, TEI leaves scaling out silently; with
    it, TEI refuses a Llama model that it cannot compute.
    """
    if transformer.position_kind != "rope":
        return {}
    scaling = dict(transformer.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    rope = {"rope_type": kind, "rope_theta": transformer.rope_theta, **scaling}
    if transformer.local_rope_theta is not None:
        return _build_grouped_fields(transformer, rope, transformer.local_rope_theta)
    fields = {"rope_theta": transformer.rope_theta, "rope_parameters": rope}
    return {**fields, "rope_scaling": scaling} if kind != "default" else fields


def _build_grouped_fields(transformer: TransformerConfig, rope: Mapping[str, Any], local_theta: float) -> dict[str, Any]:
    """Return the RoPE fields of a family whose layers with a window have another base, and which layers those are.

    - Gemma 3 gets no `rope_parameters` by kind of layer, because TEI refuses a config with them. transformers reads both forms.
    - Without the size of a group, TEI refuses a model whose layers form no groups.
    """
    family, group = FAMILIES[transformer.family], find_window_group(transformer)
    fields: dict[str, Any] = {family.get_key("rope_theta"): rope["rope_theta"], family.get_key("local_rope_theta"): local_theta}
    if group is not None:
        fields[WINDOW_GROUP_KEYS[transformer.family]] = group
    if transformer.family == "gemma3_text":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {**fields, "rope_scaling": scaling} if scaling["rope_type"] != "default" else fields
    local_rope = {"rope_type": "default", "rope_theta": local_theta}
    return {**fields, "rope_parameters": {"full_attention": dict(rope), "sliding_attention": local_rope}}


def build_module_list(spec: EmbeddingSpec) -> list[dict[str, Any]]:
    """Return modules.json. TEI looks for the folder 1_Pooling, and without it refuses a model with its own pooling."""
    kinds = ["Transformer", *(() if spec.pooling in POOLING_MODES else ("TokenPooling",)), "Pooling"]
    dense_count = len(spec.hidden_projections) + 1 if spec.projection else 0
    kinds += [*["Dense"] * dense_count, *(("Normalize",) if spec.normalize else ())]
    return [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": TOKEN_POOLING_TYPE if kind == "TokenPooling" else MODULE_TYPE.format(kind),
        }
        for i, kind in enumerate(kinds)
    ]


def build_pooling_config(spec: EmbeddingSpec, width: int) -> dict[str, Any]:
    """Return the config of the Pooling module, in the form of all versions before sentence-transformers 5.4.

    vLLM reads the keys in their order, and some versions of it take the first flag that is there: `include_prompt` comes last.
    """
    pooling = spec.pooling if spec.pooling in POOLING_MODES else "mean"
    flags = {f"pooling_mode_{POOLING_FLAGS[kind]}": kind == pooling for kind in POOLING_FLAG_ORDER}
    return {"word_embedding_dimension": width, **flags, "include_prompt": spec.include_instruction}


def build_dense_configs(spec: EmbeddingSpec, width: int) -> list[dict[str, Any]]:
    """Return the configs of the Dense modules, with the keys that every version of sentence-transformers accepts.

    Args:
        spec: Spec of the model.
        width: Width of the vectors before the first module.
    """
    if not spec.projection:
        return []
    last = HiddenProjection(width=spec.projection, bias=spec.projection_bias, activation=spec.projection_activation)
    layers = [*spec.hidden_projections, last]
    return [
        {
            "in_features": in_features,
            "out_features": layer.width,
            "bias": layer.bias,
            "activation_function": ACTIVATION_CLASSES[layer.activation],
        }
        for in_features, layer in zip([width, *(layer.width for layer in layers)], layers, strict=False)
    ]


def build_transformer_config(spec: EmbeddingSpec) -> dict[str, Any]:
    """Return sentence_bert_config.json. vLLM and TEI read the maximum length from it."""
    return {"max_seq_length": spec.max_length, "do_lower_case": False}


def build_model_config(spec: EmbeddingSpec, family: str) -> dict[str, Any]:
    """Return config_sentence_transformers.json: prompts, similarity, and the versions that the model needs.

    sentence-transformers 6 checks `requirements` before it loads a model.

    Args:
        spec: Spec of the model.
        family: Family of the transformer.
    """
    version = "" if spec.attention == "causal" else FAMILIES[family].bidirectional_since
    requirements = {"transformers": {"specifier": f">={version}", "reason": REQUIREMENT_REASON}}
    default_name = find_default_prompt_name(spec)
    plain_prompts = {default_name: spec.plain_prompt} if default_name else {}
    versions = {"sentence_transformers": "sentence-transformers", "transformers": "transformers", "pytorch": "torch"}
    return {
        "model_type": "SentenceTransformer",
        "__version__": {key: importlib.metadata.version(package) for key, package in versions.items()},
        "prompts": {"query": "", "document": "", **spec.prompts, **plain_prompts},
        "default_prompt_name": default_name,
        "similarity_fn_name": "cosine",
        **({"requirements": requirements} if version else {}),
    }


def find_default_prompt_name(spec: EmbeddingSpec) -> str | None:
    """Return the name under which the prompt of plain texts is stored, without replacing another prompt; None without one."""
    if not spec.plain_prompt:
        return None
    equal = [name for name, prompt in spec.prompts.items() if prompt == spec.plain_prompt]
    free = [name for name in ("document", "plain", "default") if name not in spec.prompts]
    return (equal or free)[0]


def build_tokenizer_config(
    saved: Mapping[str, Any], spec: EmbeddingSpec, transformer: TransformerConfig, adds_bos: bool, adds_eos: bool
) -> dict[str, Any]:
    """Return tokenizer_config.json, built from the one that transformers saves.

    - `tokenizer_class`: transformers 4 has no `TokenizersBackend`. It ignores `is_causal`, so it must not load a bidirectional
      model of a family with that field. Other models it may load, with a class that takes BOS and EOS from tokenizer.json. It
      has another one for Qwen2.
    - `add_bos_token`, `add_eos_token`: llama.cpp reads them before tokenizer.json.

    All readers support the tokenizers of encoders: these keep their class, under its old name, and their special tokens.

    Args:
        saved: The file as transformers saves it.
        spec: Spec of the model.
        transformer: The transformer.
        adds_bos: Whether tokenizer.json starts texts with BOS.
        adds_eos: Whether tokenizer.json ends texts with EOS.
    """
    fields = {key: value for key, value in saved.items() if key not in LOADING_KEYS}
    tokenizer_class = saved.get("tokenizer_class")
    if FAMILIES[transformer.family].is_encoder:
        if tokenizer_class != "TokenizersBackend":
            return fields
        # By default, the class of transformers 4 returns token types too, which ModernBERT does not take.
        return {"model_input_names": list(MODEL_INPUTS), **fields, "tokenizer_class": "PreTrainedTokenizerFast"}
    if spec.attention != "causal" and FAMILIES[transformer.family].bidirectional_since >= "5":
        tokenizer_class = "TokenizersBackend"
    elif transformer.family != "qwen2":
        tokenizer_class = "PreTrainedTokenizerFast"
    return {**fields, "add_bos_token": adds_bos, "add_eos_token": adds_eos, "tokenizer_class": tokenizer_class}
