#!/usr/bin/env python3
"""Measure how closely jaxembed's transformer matches transformers on a real checkpoint and real texts, in float32.

    python benchmarks/parity.py BASE TEXTS.jsonl [--field text] [--count 64]

BASE is a model folder, TEXTS.jsonl has texts in the field --field. The script cuts --count texts of 5 to 400 tokens from
them. jaxembed encodes them packed, transformers one by one: with causal attention and last-token pooling (only decoders), and
with bidirectional attention and mean pooling. Prints a Markdown table (least cosine, largest absolute difference of
any vector element) and, on the last line, one JSON object. Exits with code 1 if a cosine is below 0.99999.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jsonl_rows import read_rows
from transformers import AutoConfig, AutoModel

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.hub.embedder import Embedder, load_embedder
from jaxembed.hub.resolve import find_base
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.families import FAMILIES, Family
from jaxembed.model.transformer import ComputeOptions

MIN_COSINE = 0.99999


def pick_texts(path: Path, field: str, count: int, tokenizer: Any) -> list[str]:
    """Return `count` texts whose lengths are evenly spaced from 5 to 400 tokens."""
    words = " ".join(row[field] for row in read_rows(path)).split()
    texts, position = [], 0
    for target in np.linspace(5, 400, count).astype(int):
        ids = tokenizer(" ".join(words[position : position + target]))["input_ids"][:target]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        position = (position + target) % (len(words) - 400)
    return texts


def encode_with_transformers(model: torch.nn.Module, embedder: Embedder, texts: list[str]) -> np.ndarray:
    """Return unit vectors [N, D], with the tokenizer and the pooling of `embedder`."""
    vectors = []
    for ids in embedder.tokenizer(texts, [""] * len(texts)).ids:
        with torch.no_grad():
            hidden = model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0]
        pooled = hidden.mean(0) if embedder.spec.pooling == "mean" else hidden[-1]
        vectors.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
    return np.stack(vectors)


def load_reference(folder: str, family: Family, spec: EmbeddingSpec) -> torch.nn.Module:
    """Load the model in transformers with the mask of `spec`."""
    config, is_causal = AutoConfig.from_pretrained(folder), spec.attention == "causal"
    if family.mask_field == "use_bidirectional_attention":  # the constructor reads it
        config = type(config).from_dict(config.to_dict() | {"use_bidirectional_attention": not is_causal})
    elif not family.is_encoder:
        config.is_causal = is_causal
    model: torch.nn.Module = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="model folder")
    parser.add_argument("texts", metavar="TEXTS.jsonl", type=Path, help="JSONL file of texts")
    parser.add_argument("--field", default="text", help="field of the text (default: %(default)s)")
    parser.add_argument("--count", type=int, default=64, help="number of texts (default: %(default)s)")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")

    base = find_base(args.base)
    embedder = load_embedder(base, EmbeddingSpec(max_length=512), ComputeOptions(), make_mesh())
    texts = pick_texts(args.texts, args.field, args.count, embedder.tokenizer.hf_tokenizer)
    lengths = [len(ids) for ids in embedder.tokenizer(texts, [""] * len(texts)).ids]
    print(f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    least_cosine = 1.0
    print("| mask | pooling | least cosine | largest difference |\n|---|---|---|---|")
    family = FAMILIES[base.transformer.family]
    causal, bidirectional = EmbeddingSpec(attention="causal", pooling="last"), EmbeddingSpec(pooling="mean")
    specs = [bidirectional] if family.is_encoder else [causal, bidirectional]
    for spec in specs:
        reference = load_reference(args.base, family, spec)
        model = EmbeddingModel(base.transformer, spec)
        ours = Embedder(model, embedder.params, embedder.tokenizer, embedder.mesh, base.hf_config)
        expected = encode_with_transformers(reference, ours, texts)
        vectors = ours.encode(texts)
        cosine, difference = float((vectors * expected).sum(1).min()), float(np.abs(vectors - expected).max())
        least_cosine = min(least_cosine, cosine)
        print(f"| {spec.attention} | {spec.pooling} | {cosine:.8f} | {difference:.2e} |", flush=True)
    print(json.dumps({"texts": len(texts), "least_cosine": least_cosine, "passed": least_cosine >= MIN_COSINE}))
    sys.exit(0 if least_cosine >= MIN_COSINE else 1)


if __name__ == "__main__":
    main()
