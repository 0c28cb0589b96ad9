"""NV-Embed's own folders: a decoder nested in the config, latent attention beside it in the weights (Lee et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxembed.config.fields import Fields
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.model.families import DecoderConfig

LENGTH = 4096  # tokens of a text, where the release is not told otherwise
# What transformers' MistralConfig takes for a key that a config leaves out.
MISTRAL = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0, "tie_word_embeddings": False,
}  # fmt: skip


def decoder_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The Hugging Face config of the decoder that a folder's config.json describes, which may be nested in it."""
    if not is_nv_embed(config):
        return dict(config)
    inner = Fields(config, where).mapping("text_config")
    return MISTRAL | inner | {"model_type": "mistral", "sliding_window": None}  # its mask is whole, whatever the config says


def nv_embed_config(config: Mapping[str, Any], spec: EmbeddingSpec, width: int) -> dict[str, Any]:
    """The config.json of a model in this form: what `decoder_config` and `nv_embed_spec` read. `config` is the decoder's.

    The code that it names is that of the published repository.
    """
    code = "nvidia/NV-Embed-v2"
    latent = {
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
            "AutoConfig": f"{code}--configuration_nvembed.NVEmbedConfig",
            "AutoModel": f"{code}--modeling_nvembed.NVEmbedModel",
        },
        "text_config": {**config, "model_type": "bidir_mistral", "architectures": ["MistralModel"]},
        "latent_attention_config": latent,
    }  # fmt: skip


def is_nv_embed(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "nvembed"


def nv_embed_spec(config: Mapping[str, Any], decoder: DecoderConfig, where: str) -> EmbeddingSpec:
    """How NV-Embed v1 and v2 treat texts (Lee et al. 2024, and the release's own code).

    EOS is put behind the text before it is cut, so a cut text has none; of the instruction, as many tokens stay out of
    the pooling as it has without BOS, counted from BOS, so its last one is pooled.
    """
    fields = Fields(config, where)
    latent = Fields(fields.mapping("latent_attention_config", {}), f"{where}: latent_attention_config")
    head_width = latent.whole("cross_dim_head", 4096)
    if head_width != decoder.width:
        told = f"expected hidden_size, {decoder.width}, as in the published models"
        raise UserError(f"{where}: cross_dim_head is {head_width}; {told}")
    return EmbeddingSpec(
        attention="bidirectional",
        pooling="latent_attention",
        latents=latent.whole("num_latents_value", 512),
        pooling_heads=latent.whole("num_cross_heads", 8),
        include_instruction=not fields.flag("is_mask_instruction", True),
        normalize=latent.flag("output_normalize", True),
        append_eos=False,
        eos_as_text=fields.flag("add_eos", True),
        pool_last_instruction_token=True,
        max_length=min(LENGTH, decoder.max_positions),
        instruction_template="Instruct: {instruction}\nQuery: ",
    )
