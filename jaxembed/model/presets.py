"""Published sizes of models, as Hugging Face configs. A size is an entry of `PRESETS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxembed.errors import UserError

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
_BERT_FIELDS = {"model_type": "bert", "vocab_size": 30_522, "type_vocab_size": 2, "max_position_embeddings": 512}
_BERT_BASE_FIELDS = {
    **_BERT_FIELDS, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
}  # fmt: skip
_ROBERTA_FIELDS = {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, "max_position_embeddings": 514}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # For training from scratch. It is a Qwen3 model, because transformers replaces the tokenizer of qwen2 folders.
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
        "gemma3-270m": {
            "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 640, "num_hidden_layers": 18,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048,
            "sliding_window": 512, "max_position_embeddings": 32_768,
        },
        "embeddinggemma-300m": {
            "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 768, "num_hidden_layers": 24,
            "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 1152,
            "sliding_window": 512, "max_position_embeddings": 2048, "use_bidirectional_attention": True,
        },
        "modernbert-base": {
            "model_type": "modernbert", "vocab_size": 50_368, "hidden_size": 768, "intermediate_size": 1152,
            "num_hidden_layers": 22, "num_attention_heads": 12,
        },
        "minilm-l6": {
            **_BERT_FIELDS, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
        },
        "bert-base": _BERT_BASE_FIELDS,
        "bert-large": {
            **_BERT_FIELDS, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        },
        "roberta-base": {**_BERT_BASE_FIELDS, **_ROBERTA_FIELDS, "model_type": "roberta", "vocab_size": 50_265},
        "xlm-roberta-base": {**_BERT_BASE_FIELDS, **_ROBERTA_FIELDS, "model_type": "xlm-roberta", "vocab_size": 250_002},
        "bge-m3": {
            **_ROBERTA_FIELDS, "model_type": "xlm-roberta", "vocab_size": 250_002, "hidden_size": 1024, "num_hidden_layers": 24,
            "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 8194,
        },
        "nv-embed": {"model_type": "nvembed", "text_config": _MISTRAL, "latent_attention_config": {}},
        "kalm-embedding-v2": _QWEN2_SMALL,
    }
)  # fmt: skip


def find_preset(name: str) -> Mapping[str, Any]:
    """Return the Hugging Face config of a preset.

    Raises:
        UserError: There is no preset of this name.
    """
    if name not in PRESETS:
        raise UserError(f"model.base: unknown preset {name!r}. Known presets: {', '.join(PRESETS)}.")
    return PRESETS[name]
