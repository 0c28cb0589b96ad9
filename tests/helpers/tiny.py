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
ENCODER_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
ENCODER_OPTIONS = {"max_position_embeddings": 64, "initializer_range": 0.2}
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
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, query_pre_attn_scalar=20, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **ENCODER_SIZES, local_attention=8, global_attn_every_n_layers=2, pad_token_id=2, bos_token_id=0, eos_token_id=1,
        cls_token_id=0, sep_token_id=1,
    ),
    "bert": lambda: transformers.BertConfig(**ENCODER_SIZES, hidden_act="gelu"),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**ENCODER_SIZES, pad_token_id=2, hidden_act="gelu_new"),
}  # fmt: skip
ENCODERS = ("modernbert", "bert", "xlm-roberta")


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


def build_wordpiece_tokenizer() -> transformers.BertTokenizer:
    """Build a BERT tokenizer of 77 entries that splits words into letters."""
    letters = string.digits + string.ascii_lowercase
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return transformers.BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})


def build_torch_model(family: str, seed: int = 0, causal: bool = True) -> torch.nn.Module:
    """Build a random model whose biases and norm scales are random too: a missing bias of zeros would not be noticed."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    if family == "gemma3_text":  # its constructor halves the window of a bidirectional mask
        config = type(config).from_dict(config.to_dict() | {"use_bidirectional_attention": not causal})
    elif family not in ENCODERS:
        config.is_causal = causal
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name.lower():
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
    build_family_tokenizer(family, **tokenizer_options).save_pretrained(path)
    return path


def build_family_tokenizer(family: str, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """Build the tokenizer of a family: wordpiece for BERT, else byte-level BPE, for some with special tokens."""
    if family == "bert":
        return build_wordpiece_tokenizer()
    tokenizer = build_tokenizer(bos=family.startswith("mistral"), **options)
    if family in ("modernbert", "xlm-roberta"):
        special_tokens = [("<s>", 0), ("</s>", 1)]
        processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special_tokens)
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def write_bert_folder(path: Path, prompts: dict[str, str] | None = None) -> Path:
    """Write a sentence-transformers folder of a BERT."""
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return _write_encoder(path, transformers.BertConfig(vocab_size=77, **sizes, **ENCODER_OPTIONS), prompts)


def write_foreign_folder(path: Path, prompts: dict[str, str] | None = None) -> Path:
    """Write a sentence-transformers folder of a DistilBERT, a family that jaxembed does not support."""
    sizes = {"dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    return _write_encoder(path, transformers.DistilBertConfig(vocab_size=77, **sizes, **ENCODER_OPTIONS), prompts)


def _write_encoder(path: Path, config: transformers.PretrainedConfig, prompts: dict[str, str] | None) -> Path:
    from sentence_transformers import SentenceTransformer  # slow to import, and few tests need it
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(path / "body")
    build_wordpiece_tokenizer().save_pretrained(path / "body")
    parts = [modules.Transformer(str(path / "body")), modules.Pooling(24, pooling_mode="cls")]
    model = SentenceTransformer(modules=parts, prompts=prompts, device="cpu")
    model.save(str(path / "model"), create_model_card=False)
    return path / "model"
