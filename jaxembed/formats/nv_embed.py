"""NV-Embed's own folder layout (Lee et al. 2024).

The config of the transformer is nested in config.json. The weights of the latent attention are next to those of the
transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxembed.config.field_lists import FieldList
from jaxembed.config.fields import Fields
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.model.families import TransformerConfig

PUBLISHED_REPOSITORY = "nvidia/NV-Embed-v2"  # exported configs refer to the Python code of this repository
DEFAULT_MAX_LENGTH = 4096  # tokens; the length that the release uses by default
# Defaults of transformers' MistralConfig for keys that a config leaves out.
MISTRAL_CONFIG_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0, "tie_word_embeddings": False,
}  # fmt: skip
NV_EMBED_FIELDS = FieldList(
    read=frozenset({"model_type", "text_config", "latent_attention_config", "add_eos", "is_mask_instruction"}),
    harmless=frozenset(
        {
            "architectures", "auto_map", "add_pad_token", "padding_side", "dtype", "torch_dtype", "transformers_version",
            "hidden_size",
        }
    ),
    refused={"mask_type": ("b",)},
)  # fmt: skip
LATENT_ATTENTION_FIELDS = FieldList(
    read=frozenset({"num_latents_value", "num_cross_heads", "cross_dim_head", "output_normalize"}),
    # The widths follow from the tensors.
    harmless=frozenset({"model_type", "hidden_dim", "latent_dim", "dtype", "torch_dtype", "transformers_version"}),
    refused={"mult": (4,)},
)


def is_nv_embed(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is in NV-Embed's layout."""
    return config.get("model_type") == "nvembed"


def read_transformer_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the Hugging Face config of the transformer: the nested one in NV-Embed's layout, otherwise `config` itself.

    Args:
        config: Content of a config.json.
        where: Origin of the config, for errors.
    """
    if not is_nv_embed(config):
        return dict(config)
    transformer = Fields(config, where).mapping("text_config")
    # The release attends to every token, whatever sliding window its config names.
    return MISTRAL_CONFIG_DEFAULTS | transformer | {"model_type": "mistral", "sliding_window": None}


def build_nv_embed_config(transformer_config: Mapping[str, Any], spec: EmbeddingSpec, width: int) -> dict[str, Any]:
    """Build the config.json of a model in NV-Embed's layout.

    It is the inverse of `read_transformer_config` and `read_nv_embed_spec`.

    Args:
        transformer_config: Hugging Face config of the transformer.
        spec: Spec of the model.
        width: Width of the transformer.
    """
    latent_attention = {
        "model_type": "latent_attention",
        "num_latents_value": spec.latents,
        "num_cross_heads": spec.pooling_heads,
        "hidden_dim": width,
        "latent_dim": width,
        "cross_dim_head": width,
        "output_normalize": spec.normalize,
        "mult": 4,
    }
    return {
        "architectures": ["NVEmbedModel"], "model_type": "nvembed", "padding_side": "right", "mask_type": "b",
        "add_eos": True, "add_pad_token": True, "is_mask_instruction": not spec.include_instruction,
        "auto_map": {
            "AutoConfig": f"{PUBLISHED_REPOSITORY}--configuration_nvembed.NVEmbedConfig",
            "AutoModel": f"{PUBLISHED_REPOSITORY}--modeling_nvembed.NVEmbedModel",
        },
        "text_config": {**transformer_config, "model_type": "bidir_mistral", "architectures": ["MistralModel"]},
        "latent_attention_config": latent_attention,
    }  # fmt: skip


def read_nv_embed_spec(config: Mapping[str, Any], transformer: TransformerConfig, where: str) -> EmbeddingSpec:
    """Return the spec of NV-Embed v1 and v2 (Lee et al. 2024, and the code of the release).

    The release does two things that the paper does not mention:

    - It appends EOS before it truncates, so truncated texts have none.
    - It leaves the instruction out of the pooling, but counts its tokens without BOS and skips that many from BOS on. The
      last token of the instruction is therefore pooled.

    Args:
        config: Content of a config.json in NV-Embed's layout.
        transformer: The transformer that the config describes.
        where: Origin of the config, for errors.

    Raises:
        UserError: The latent attention has other sizes than in the published models.
    """
    fields = Fields(config, where)
    NV_EMBED_FIELDS.check(config, where)
    latent_config, latent_where = fields.mapping("latent_attention_config", {}), f"{where}: latent_attention_config"
    LATENT_ATTENTION_FIELDS.check(latent_config, latent_where)
    latent_attention = Fields(latent_config, latent_where)
    head_width = latent_attention.integer("cross_dim_head", 4096)
    if head_width != transformer.width:
        raise UserError(
            f"{where}: cross_dim_head is {head_width} (expected hidden_size, {transformer.width}). "
            "Heads of other widths than in the published models are not supported."
        )
    return EmbeddingSpec(
        attention="bidirectional",
        pooling="latent_attention",
        latents=latent_attention.integer("num_latents_value", 512),
        pooling_heads=latent_attention.integer("num_cross_heads", 8),
        include_instruction=not fields.boolean("is_mask_instruction", True),
        normalize=latent_attention.boolean("output_normalize", True),
        append_eos=False,
        eos_as_text=fields.boolean("add_eos", True),
        pool_last_instruction_token=True,
        max_length=min(DEFAULT_MAX_LENGTH, transformer.max_positions),
        instruction_template="Instruct: {instruction}\nQuery: ",
        instruction_table="nv_embed",
    )
