"""Tiny random models of every family, written as Hugging Face folders."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "A man is playing a guitar on a stage.",
    "Return the indices of the maximum values along an axis.",
    "naïve café 数学 🙂",
    "short",
    "The quick brown fox jumps over the lazy dog, again and again, until the evening comes and the dog goes home to sleep.",
    "def f(x): return x + 1",
]
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, head_dim=8, sliding_window=5),
    "qwen2-mixed": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention", *["full_attention"] * 2]
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "llama": lambda: transformers.LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
}  # fmt: skip


def build_tokenizer(
    bos: bool = False, chat_template: str | None = None, prefix_space: bool = False
) -> transformers.PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer of 290 entries.

    Args:
        bos: Whether every text starts with <s>.
        chat_template: Chat template of the tokenizer.
        prefix_space: Whether every text starts with a space, as with Mistral's tokenizer.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )


def build_qwen_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer of the class that transformers uses for every qwen2 folder."""
    state = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
    vocab = {token: i for i, token in enumerate(t for t in state["vocab"] if not t.startswith("<"))}
    qwen_tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in state["merges"]])
    qwen_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return qwen_tokenizer


def build_torch_model(family: str, seed: int = 0, causal: bool = True) -> torch.nn.Module:
    """Build a random model whose biases and norm scales are random too: a missing bias of zeros would not be noticed."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.is_causal = causal
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def write_folder(path: Path, family: str = "qwen2", seed: int = 0, head: bool = False, **tokenizer_options: Any) -> Path:
    """Write a base checkpoint: config, weights (with a language-model head if `head`) and tokenizer."""
    model = build_torch_model(family, seed)
    if head:
        body = model
        model = transformers.AutoModelForCausalLM.from_config(body.config)
        model.model.load_state_dict(body.state_dict())
    model.save_pretrained(path)
    build_tokenizer(bos=family.startswith("mistral"), **tokenizer_options).save_pretrained(path)
    return path


def write_bert_folder(path: Path, prompts: dict[str, str] | None = None) -> Path:
    """Write a sentence-transformers folder of an encoder, which the decoder cannot represent."""
    from sentence_transformers import SentenceTransformer  # slow to import, and few tests need it
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    letters = string.digits + string.ascii_lowercase
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(vocab), **sizes, max_position_embeddings=64, initializer_range=0.2)
    transformers.BertModel(config).save_pretrained(path / "body")
    transformers.BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}).save_pretrained(path / "body")
    parts = [modules.Transformer(str(path / "body")), modules.Pooling(24, pooling_mode="cls")]
    model = SentenceTransformer(modules=parts, prompts=prompts, device="cpu")
    model.save(str(path / "model"), create_model_card=False)
    return path / "model"
