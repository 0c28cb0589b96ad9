#!/usr/bin/env python3
"""Write exports of small random models of every kind, with texts and their vectors, for benchmarks/readers.py.

    python benchmarks/reader_exports.py OUT --tokenizer FOLDER --bert-tokenizer FOLDER [--kinds NAME ...]

OUT/KIND is an export. OUT/KIND.json has texts, their prompts, and the vectors of the model in JAX (float32), among them the
probes of the export's probe.json. --tokenizer and --bert-tokenizer name folders with the tokenizers of a Qwen2 model and of an
uncased BERT, which llama.cpp's converter knows; half of the kinds use one of them. The others have a tokenizer trained from
scratch. Prints one line per kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from readers import SHORT_DIM

from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec, HiddenProjection
from jaxembed.data.bpe import train_tokenizer
from jaxembed.data.tokenize import set_special_tokens
from jaxembed.devices.mesh import make_mesh
from jaxembed.hub.base import Base
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import Embedder
from jaxembed.hub.export import export
from jaxembed.hub.parity import PROBE_INSTRUCTION, PROBE_TEXTS
from jaxembed.hub.resolve import find_base
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.model.embedder import EmbeddingModel, init_params
from jaxembed.model.lora import merge_adapters
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.model.transformer import ComputeOptions

MAX_LENGTH = 64  # tokens; fewer than the decoder's positions, so that readers have to respect it
VOCABULARY_SIZE = 600  # of the tokenizers that are trained from scratch
QUERY_PROMPT = EmbeddingSpec().build_prompt(PROBE_INSTRUCTION)
PROJECTION = {"projection": 48, "projection_bias": True, "projection_activation": "tanh"}
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 512, "initializer_range": 0.15,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ENCODER_HEADS = {"num_key_value_heads": SIZES["num_attention_heads"]}  # every query head has its own keys
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2": (
        transformers.Qwen2Config,
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 16}),
    "llama": (transformers.LlamaConfig, {}),
    "llama3-rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "sliding_window_pattern": 2},
    ),
    "bert": (transformers.BertConfig, {**ENCODER_HEADS, "pad_token_id": 0}),
    "xlm-roberta": (transformers.XLMRobertaConfig, {**ENCODER_HEADS, "pad_token_id": 1, "type_vocab_size": 1}),
    "modernbert": (
        transformers.ModernBertConfig,
        {**ENCODER_HEADS, "pad_token_id": 1, "local_attention": 16, "global_attn_every_n_layers": 2},
    ),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of export.

    Attributes:
        family: Key of `CONFIGS`.
        choices: Fields of the spec that differ from `SHARED_CHOICES`.
        dtype: Dtype of the weights in the folder.
        has_adapters: Whether LoRA adapters are merged into the weights.
        has_head: Whether there is a language-model head, as after training on answers.
        tokenizer: Name of the tokenizer: "qwen2" or "bert", those of the options; "own" or "own encoder", trained from scratch.
    """

    family: str
    choices: dict[str, Any]
    dtype: str = "float32"
    has_adapters: bool = False
    has_head: bool = False
    tokenizer: str = "own"


CAUSAL_LAST = {"attention": "causal", "pooling": "last"}
EMBEDDING_GEMMA = {"hidden_projections": (HiddenProjection(width=96),), "projection": 64, "matryoshka_dims": (SHORT_DIM,)}
KINDS = {
    "qwen2 causal last": Kind("qwen2", CAUSAL_LAST, tokenizer="qwen2"),
    "qwen2 bidirectional mean": Kind("qwen2", {}, tokenizer="qwen2"),
    "qwen3 causal last": Kind("qwen3", CAUSAL_LAST),
    "qwen3 bidirectional mean": Kind("qwen3", {}, tokenizer="qwen2"),
    "mistral causal last": Kind("mistral", CAUSAL_LAST),
    "mistral bidirectional mean": Kind("mistral", {}, tokenizer="qwen2"),
    "llama causal last": Kind("llama", CAUSAL_LAST),
    "llama bidirectional mean": Kind("llama", {}, tokenizer="qwen2"),
    "causal mean": Kind("qwen3", {"attention": "causal"}),
    "first": Kind("qwen3", {"pooling": "first"}, tokenizer="qwen2"),
    "weighted mean": Kind("qwen3", {"pooling": "weighted_mean"}, tokenizer="qwen2"),
    "max": Kind("qwen3", {"pooling": "max"}),
    "latent attention": Kind("qwen3", {"pooling": "latent_attention", "latents": 8, "pooling_heads": 2}),
    "instruction left out": Kind("qwen3", {"include_instruction": False}),
    "default prompt": Kind("qwen3", {"plain_prompt": "passage: ", "prompts": {"query": QUERY_PROMPT, "document": "passage: "}}),
    "no EOS": Kind("qwen3", {"append_eos": False}),
    "projection": Kind("qwen3", PROJECTION, tokenizer="qwen2"),
    "matryoshka": Kind("qwen3", {"matryoshka_dims": (SHORT_DIM,)}),
    "merged LoRA": Kind("qwen3", CAUSAL_LAST, has_adapters=True),
    "language-model head": Kind("llama", {}, has_head=True, tokenizer="qwen2"),
    "bfloat16": Kind("qwen3", {}, dtype="bfloat16"),
    "sliding window": Kind("mistral-window", {"attention": "causal", "pooling": "mean"}, tokenizer="qwen2"),
    "llama3 RoPE": Kind("llama3-rope", {"attention": "causal", "pooling": "mean"}, tokenizer="qwen2"),
    "gemma3 causal last": Kind("gemma3", CAUSAL_LAST),
    "EmbeddingGemma": Kind("gemma3", EMBEDDING_GEMMA),
    "BERT mean": Kind("bert", {}, tokenizer="bert"),
    "BERT first": Kind("bert", {"pooling": "first"}, tokenizer="bert"),
    "XLM-R mean": Kind("xlm-roberta", {}, tokenizer="own encoder"),
    "ModernBERT mean": Kind("modernbert", {}, tokenizer="own encoder"),
}
SHARED_CHOICES = {"max_length": MAX_LENGTH, "include_instruction": True, "prompts": {"query": QUERY_PROMPT, "document": ""}}


def train_own_tokenizer(is_encoder: bool) -> Any:
    """Train a tokenizer on the probe texts. That of an encoder puts [CLS] and [SEP] around each text."""
    tokenizer = train_tokenizer([*PROBE_TEXTS, QUERY_PROMPT] * 3, VOCABULARY_SIZE)
    if is_encoder:
        tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
        special_tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
        set_special_tokens(tokenizer, special_tokens[:1], special_tokens[1:])
    return tokenizer


def write_base(folder: Path, kind: Kind, tokenizer: Any) -> None:
    """Write a random transformer. Biases and norm scales are random too, so that missing ones are noticed."""
    torch.manual_seed(0)
    config_class, options = CONFIGS[kind.family]
    config = config_class(vocab_size=len(tokenizer), **{**SIZES, **options})
    auto_class = transformers.AutoModelForCausalLM if kind.has_head else transformers.AutoModel
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name.lower():
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_embedder(base: Base, kind: Kind) -> Embedder:
    """Load a base with the kind's spec. Pooling, projection and adapters are random; adapters are merged."""
    spec, mesh = EmbeddingSpec(**{**SHARED_CHOICES, **kind.choices}), make_mesh(1)
    lora = LORA if kind.has_adapters else None
    model = EmbeddingModel(base.transformer, spec, ComputeOptions(), lora, kind.has_head)
    shapes, shardings = compute_shapes_and_shardings(model, mesh)
    names = ("decoder", "head") if kind.has_head else ("decoder",)
    parts = ({name: tree[name] for name in names} for tree in (shapes, shardings))
    params = flatten_dict(init_params(model, jax.random.key(0), shardings))
    random = np.random.default_rng(0)
    for path, x in params.items():
        if "lora" in path[-1] or path[0] == "pooling":
            params[path] = jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype)
    tree = unflatten_dict(params | flatten_dict(base.load(*parts)))
    if lora is not None:
        tree = merge_adapters(tree, lora)
    tokenizer = build_text_tokenizer(base.tokenizer(), spec, base)
    served = EmbeddingModel(base.transformer, spec, ComputeOptions(), has_head=kind.has_head)
    return Embedder(served, tree, tokenizer, mesh, base.hf_config)


def pick_texts(embedder: Embedder, prompt: str) -> list[str]:
    """Return the probe texts, texts within a token of the maximum length, and texts that tokenizers treat differently."""
    long_text = max(PROBE_TEXTS, key=len)
    prefixes = [long_text[:end] for end in range(1, MAX_LENGTH * 8)]
    lengths = embedder.tokenizer.count_untruncated_tokens(prefixes, [prompt] * len(prefixes))
    prefix_by_length = {int(length): text for length, text in zip(lengths, prefixes, strict=True)}
    around = [prefix_by_length[MAX_LENGTH + offset] for offset in (-1, 0, 1)]
    return [*PROBE_TEXTS, *around, "  two spaces before and after  ", "line one\n\nline two\ttab\r\n", "x"]


def name_group(embedder: Embedder, prompt: str, text: str) -> str:
    """Return the group in which the table counts a text."""
    (length,) = embedder.tokenizer.count_untruncated_tokens([text], [prompt])
    if length > MAX_LENGTH:
        return "cut"
    if text != text.strip():
        return "spaces"
    if prompt:
        return "prompt"
    return "newline" if "\n" in text else "plain"


def write_rows(path: Path, embedder: Embedder) -> None:
    """Write the texts, their prompts, groups and vectors."""
    rows = []
    for prompt in dict.fromkeys([embedder.spec.plain_prompt, *embedder.spec.prompts.values()]):
        texts = pick_texts(embedder, prompt)
        for text, vector in zip(texts, embedder.encode(texts, prompt=prompt), strict=True):
            group = name_group(embedder, prompt, text)
            rows.append({"group": group, "prompt": prompt, "text": text, "vector": vector.tolist()})
    path.write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")


def write_kind(out: Path, name: str, kind: Kind, tokenizer: Any) -> str:
    """Write one export and its rows. Return a line with its largest difference from the model."""
    folder = out / name.replace(" ", "-")
    with tempfile.TemporaryDirectory() as scratch:
        write_base(Path(scratch), kind, tokenizer)
        embedder = load_embedder(find_base(scratch), kind)
    shutil.rmtree(folder, ignore_errors=True)
    report = export(embedder, folder, kind.dtype, Card(name, "random weights"), onnx="float32")
    # A 16-bit folder is compared with its own rounded weights, computed in float32.
    written = embedder if kind.dtype == "float32" else Embedder.load(folder)
    write_rows(out / f"{folder.name}.json", written)
    return f"{name}: largest difference {report.parity.error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the exports")
    parser.add_argument("--tokenizer", metavar="FOLDER", required=True, help="folder of a Qwen2 tokenizer")
    parser.add_argument("--bert-tokenizer", metavar="FOLDER", required=True, help="folder of the tokenizer of an uncased BERT")
    parser.add_argument("--kinds", metavar="NAME", nargs="*", default=list(KINDS), help="kinds of exports (default: all)")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizers = {
        "own": train_own_tokenizer(is_encoder=False),
        "own encoder": train_own_tokenizer(is_encoder=True),
        "qwen2": transformers.AutoTokenizer.from_pretrained(args.tokenizer),
        "bert": transformers.AutoTokenizer.from_pretrained(args.bert_tokenizer),
    }
    for name in args.kinds:
        print(write_kind(args.out, name, KINDS[name], tokenizers[KINDS[name].tokenizer]), flush=True)


if __name__ == "__main__":
    main()
