#!/usr/bin/env python3
"""Compares our decoder with transformers on a real checkpoint and real texts, in float32.

    python benchmarks/parity.py BASE TEXTS.jsonl [--field text] [--count 64]

Takes `count` texts of 5 to 400 tokens, spread over the lengths (texts are joined where the file has no long ones), embeds
them packed with jaxembed and one by one with transformers, causal with last-token pooling and bidirectional with mean
pooling, and prints the least cosine and the largest difference. The last line is one JSON object. Exits 1 below a cosine of
0.99999.
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
from transformers import AutoModel

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.hub.base import find_base
from jaxembed.hub.embedder import Embedder, from_base
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel

LEAST_COSINE = 0.99999


def pick_texts(path: Path, field: str, count: int, tokenizer: Any) -> list[str]:
    """`count` texts whose lengths run from 5 to 400 tokens."""
    rows = [json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines()]
    words = " ".join(rows).split()
    texts, at = [], 0
    for target in np.linspace(5, 400, count).astype(int):
        ids = tokenizer(" ".join(words[at : at + target]))["input_ids"][:target]
        texts.append(tokenizer.decode(ids))
        at = (at + target) % (len(words) - 400)
    return texts


def torch_vectors(model: torch.nn.Module, embedder: Embedder, texts: list[str]) -> np.ndarray:
    out = []
    for ids in embedder.tokenizer(texts, [""] * len(texts)).ids:
        with torch.no_grad():
            hidden = model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0]
        pooled = hidden.mean(0) if embedder.spec.pooling == "mean" else hidden[-1]
        out.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
    return np.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--field", default="text")
    parser.add_argument("--count", type=int, default=64)
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")

    base = find_base(args.base)
    embedder = from_base(base, EmbeddingSpec(max_length=512), Compute(), make_mesh())
    texts = pick_texts(args.texts, args.field, args.count, embedder.tokenizer.hf)
    lengths = [len(ids) for ids in embedder.tokenizer(texts, [""] * len(texts)).ids]
    print(f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    worst = 1.0
    print("| mask | pooling | least cosine | largest difference |\n|---|---|---|---|")
    for attention, pooling in (("causal", "last"), ("bidirectional", "mean")):
        reference = AutoModel.from_pretrained(args.base, dtype=torch.float32, attn_implementation="eager")
        reference.config.is_causal = attention == "causal"
        model = EmbeddingModel(base.decoder, EmbeddingSpec(attention=attention, pooling=pooling))
        ours = Embedder(model, embedder.params, embedder.tokenizer, embedder.mesh, base)
        theirs = torch_vectors(reference, ours, texts)
        vectors = ours.encode(texts)
        cosine, difference = float((vectors * theirs).sum(1).min()), float(np.abs(vectors - theirs).max())
        worst = min(worst, cosine)
        print(f"| {attention} | {pooling} | {cosine:.8f} | {difference:.2e} |", flush=True)
    print(json.dumps({"texts": len(texts), "least_cosine": worst, "passed": worst >= LEAST_COSINE}))
    sys.exit(0 if worst >= LEAST_COSINE else 1)


if __name__ == "__main__":
    main()
