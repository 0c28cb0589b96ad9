"""The JSON files of a stock folder: what each reader (transformers, sentence-transformers, vLLM, TEI, llama.cpp) looks for.

Newer and older readers expect the same facts under different keys. Every key is written that some reader needs, as long as no
other reader refuses it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from jaxembed.config.model import PoolingKind
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.formats.sentence_transformers import POOLING_FLAGS, POOLING_MODES, TOKEN_POOLING_TYPE
from jaxembed.model.families import FAMILIES, DecoderConfig

# Types that every sentence-transformers resolves: versions 3 to 5.3 have these modules, newer ones map them to new paths. vLLM
# and TEI compare them literally.
MODULE_TYPE = "sentence_transformers.models.{}"
ACTIVATION_CLASSES = {"identity": "torch.nn.modules.linear.Identity", "tanh": "torch.nn.modules.activation.Tanh"}
POOLING_FLAG_ORDER: tuple[PoolingKind, ...] = ("first", "mean", "max", "weighted_mean", "last")
SERVED_POOLINGS: frozenset[PoolingKind] = frozenset({"mean", "last", "first"})  # that vLLM and llama.cpp compute
# End of the class name of a model that only sentence-transformers computes right. vLLM and llama.cpp look a model up by its
# class name, so they refuse it. With a name they know, vLLM would pool the last token. Other readers go by `model_type`.
OWN_POOLING_SUFFIX = "WithOwnPooling"
BIDIRECTIONAL_REQUIREMENTS = {
    "transformers": {
        "specifier": ">=5.2",
        "reason": "Earlier versions ignore is_causal and would compute other vectors, with a causal mask.",
    }
}
# Fields of a base's config.json that do not belong to the exported model.
UNSAVED_CONFIG_KEYS = ("torch_dtype", "auto_map", "_name_or_path", "tokenizer_class", "matryoshka_dimensions", "rope_scaling")

LOADING_KEYS = ("is_local", "local_files_only")  # fields of a saved tokenizer_config.json that say how it was loaded


def build_config(
    hf_config: Mapping[str, Any], spec: EmbeddingSpec, decoder: DecoderConfig, tokenizer: Any, dtype: str
) -> dict[str, Any]:
    """Return config.json: that of the base, with the model's mask and special tokens, for old and new readers.

    Args:
        hf_config: Hugging Face config of the base.
        spec: Spec of the model.
        decoder: The decoder that `hf_config` describes.
        tokenizer: Fast Hugging Face tokenizer of the model.
        dtype: Dtype of the weights.
    """
    is_causal = spec.attention == "causal"
    architecture = FAMILIES[decoder.family].architecture
    config = {key: value for key, value in hf_config.items() if key not in UNSAVED_CONFIG_KEYS} | {
        "architectures": [architecture if spec.pooling in SERVED_POOLINGS else architecture + OWN_POOLING_SUFFIX],
        "is_causal": is_causal,  # transformers, vLLM, and TEI's Qwen2
        "use_bidirectional_attention": not is_causal,  # TEI's other families
        "dtype": dtype,
        "head_dim": decoder.head_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **build_rope_fields(decoder),
    }
    if spec.matryoshka_dims:
        config["matryoshka_dimensions"] = sorted({*spec.matryoshka_dims, spec.projection or decoder.width})
    return config


def build_rope_fields(decoder: DecoderConfig) -> dict[str, Any]:
    """Return the rotary positions as transformers 5 reads them (`rope_parameters`), and as older readers do, beside it.

    Without `rope_theta` at the top, transformers 4 takes 10,000. Without `rope_scaling`, TEI leaves scaling out silently; with
    it, TEI refuses a Llama model that it cannot compute.
    """
    scaling = dict(decoder.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    fields = {
        "rope_theta": decoder.rope_theta,
        "rope_parameters": {"rope_type": kind, "rope_theta": decoder.rope_theta, **scaling},
    }
    return {**fields, "rope_scaling": scaling} if kind != "default" else fields


def build_module_list(spec: EmbeddingSpec) -> list[dict[str, Any]]:
    """Return modules.json. TEI looks for the folder 1_Pooling, and refuses a model with a pooling of its own without it."""
    kinds = ["Transformer", *(() if spec.pooling in POOLING_MODES else ("TokenPooling",)), "Pooling"]
    kinds += [*(("Dense",) if spec.projection else ()), *(("Normalize",) if spec.normalize else ())]
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


def build_dense_config(spec: EmbeddingSpec, width: int) -> dict[str, Any]:
    """Return the config of the Dense module, with the keys that every version of sentence-transformers accepts."""
    return {
        "in_features": width,
        "out_features": spec.projection,
        "bias": spec.projection_bias,
        "activation_function": ACTIVATION_CLASSES[spec.projection_activation],
    }


def build_transformer_config(spec: EmbeddingSpec) -> dict[str, Any]:
    """Return sentence_bert_config.json. vLLM and TEI know the maximum length from it."""
    return {"max_seq_length": spec.max_length, "do_lower_case": False}


def build_model_config(spec: EmbeddingSpec) -> dict[str, Any]:
    """Return config_sentence_transformers.json: prompts, similarity, and the versions that the model needs.

    sentence-transformers 6 checks `requirements` before it loads a model.
    """
    default_name = find_default_prompt_name(spec)
    plain_prompts = {default_name: spec.plain_prompt} if default_name else {}
    versions = {"sentence_transformers": "sentence-transformers", "transformers": "transformers", "pytorch": "torch"}
    return {
        "model_type": "SentenceTransformer",
        "__version__": {key: importlib.metadata.version(package) for key, package in versions.items()},
        "prompts": {"query": "", "document": "", **spec.prompts, **plain_prompts},
        "default_prompt_name": default_name,
        "similarity_fn_name": "cosine",
        **({} if spec.attention == "causal" else {"requirements": BIDIRECTIONAL_REQUIREMENTS}),
    }


def find_default_prompt_name(spec: EmbeddingSpec) -> str | None:
    """Return the name under which the prompt of plain texts is stored, without replacing another prompt; None without one."""
    if not spec.plain_prompt:
        return None
    equal = [name for name, prompt in spec.prompts.items() if prompt == spec.plain_prompt]
    free = [name for name in ("document", "plain", "default") if name not in spec.prompts]
    return (equal or free)[0]


def build_tokenizer_config(
    saved: Mapping[str, Any], spec: EmbeddingSpec, decoder: DecoderConfig, adds_bos: bool, adds_eos: bool
) -> dict[str, Any]:
    """Return tokenizer_config.json, out of what transformers saves.

    - `tokenizer_class`: transformers 4 has no `TokenizersBackend`. It ignores `is_causal`, so it must not load a bidirectional
      model. A causal model it may load, with a class that takes BOS and EOS from tokenizer.json. It has another one for Qwen2.
    - `add_bos_token`, `add_eos_token`: llama.cpp reads them before tokenizer.json.

    Args:
        saved: The file as transformers saves it.
        spec: Spec of the model.
        decoder: The decoder.
        adds_bos: Whether tokenizer.json starts texts with BOS.
        adds_eos: Whether tokenizer.json ends texts with EOS.
    """
    tokenizer_class = saved.get("tokenizer_class")
    if spec.attention != "causal":
        tokenizer_class = "TokenizersBackend"
    elif decoder.family != "qwen2":
        tokenizer_class = "PreTrainedTokenizerFast"
    lasting = {key: value for key, value in saved.items() if key not in LOADING_KEYS}
    return {**lasting, "add_bos_token": adds_bos, "add_eos_token": adds_eos, "tokenizer_class": tokenizer_class}
