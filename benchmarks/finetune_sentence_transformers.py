#!/usr/bin/env python3
"""Measure the baseline: contrastive fine-tuning with sentence-transformers' own trainer.

    python benchmarks/finetune_sentence_transformers.py BASE DATA.jsonl OUT [--steps 60] [--batch-size 64]

BASE is a sentence-transformers folder, or a decoder folder (Qwen2, Mistral, ...), which gets mean pooling and L2 normalization
and keeps its causal attention. Each line of DATA.jsonl gives one pair: query and pos[0]. It is trained in float32 on the CPU
with all cores, without prompts, and decoders without EOS.
The loss is MultipleNegativesRankingLoss with scale 20 (InfoNCE at temperature 0.05 with in-batch negatives, from query to
document). The optimizer is AdamW with weight decay 0.01 (none on biases and norms, as in the trainer), linear warmup
and decay, and gradient clipping at 1. `--steps 0` saves the untrained model.

Prints the loss of each step to standard error and, as the last line of standard output, one JSON object: seconds per step,
useful and padded tokens per step, peak memory, and all losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jsonl_rows import read_rows
from script_runs import read_peak_gib
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import PrinterCallback, TrainerCallback


def read_pairs(path: Path) -> Dataset:
    """Return the queries of a JSONL file of pairs with their first positives."""
    rows = read_rows(path)
    return Dataset.from_dict({"query": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]})


def build_model(base: str, max_length: int) -> SentenceTransformer:
    """Load a base in float32. A decoder gets mean pooling and L2 normalization."""
    if Path(base, "modules.json").exists():
        model = SentenceTransformer(base, device="cpu", model_kwargs={"dtype": torch.float32})
        model.max_seq_length = max_length
        return model
    # By default, sentence-transformers 6 wraps every text in the tokenizer's chat template.
    transformer = Transformer(
        base,
        max_seq_length=max_length,
        model_kwargs={"dtype": torch.float32},
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    transformer.tokenizer.chat_template = None
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


class TokenCounter:
    """Counts the tokens that the model receives, with and without padding."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.useful = self.padded = 0
        transformer.register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple) -> None:
        mask = args[0]["attention_mask"]
        self.useful += int(mask.sum())
        self.padded += mask.numel()


class StepLog(TrainerCallback):
    """Records the loss and the wall time of each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.step_start)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        line = {
            "step": state.global_step,
            "loss": self.losses[-1],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "step_seconds": round(self.seconds[-1], 3),
        }
        print(json.dumps(line), file=sys.stderr, flush=True)


def freeze_embedding(model: SentenceTransformer) -> None:
    """Stop training the token embedding of a model."""
    model[0].auto_model.get_input_embeddings().requires_grad_(False)


def train(model: SentenceTransformer, pairs: Dataset, opts: argparse.Namespace) -> dict:
    """Train `model` in place. Return the seconds and tokens of a step, and the loss of each step."""
    log, tokens = StepLog(), TokenCounter(model[0])
    with tempfile.TemporaryDirectory() as scratch:
        args = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            max_steps=opts.steps,
            per_device_train_batch_size=opts.batch_size,
            dataloader_drop_last=True,
            optim="adamw_torch",
            learning_rate=opts.learning_rate,
            weight_decay=0.01,
            lr_scheduler_type="linear",
            warmup_steps=opts.warmup_steps,
            max_grad_norm=1.0,
            seed=opts.seed,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        loss = MultipleNegativesRankingLoss(model, scale=20.0)
        if opts.mini_batch_size:
            loss = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=opts.mini_batch_size)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss, callbacks=[log])
        trainer.remove_callback(PrinterCallback)  # standard output has only the result
        trainer.train()
    useful_per_step = tokens.useful / opts.steps
    mean = statistics.mean(log.seconds)
    return {
        "seconds_per_step": round(mean, 3),
        "median_seconds_per_step": round(statistics.median(log.seconds), 3),
        "useful_tokens_per_step": round(useful_per_step, 1),
        "padded_tokens_per_step": round(tokens.padded / opts.steps, 1),
        "useful_tokens_per_second": round(useful_per_step / mean, 1),
        "losses": log.losses,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="sentence-transformers or decoder folder")
    parser.add_argument("data", metavar="DATA.jsonl", type=Path, help="JSONL file of pairs (query, pos)")
    parser.add_argument("out", metavar="OUT", help="folder to write the sentence-transformers model to")
    parser.add_argument(
        "--steps", type=int, default=60, help="training steps; 0 saves the untrained model (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="(default: %(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=256, help="tokens per text; longer texts are truncated (default: %(default)s)"
    )
    parser.add_argument(
        "--mini-batch-size", type=int, default=0, help="texts encoded at a time, with gradient caching (default: 0, all)"
    )
    parser.add_argument("--frozen-embedding", action="store_true", help="do not train the token embedding")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    opts = parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(opts.seed)
    model = build_model(opts.base, opts.max_length)
    if opts.frozen_embedding:
        freeze_embedding(model)
    results: dict[str, Any] = {"steps": opts.steps, "batch_size": opts.batch_size, "max_length": opts.max_length}
    if opts.steps:
        results |= train(model, read_pairs(opts.data), opts)
    model.save(opts.out)
    results["peak_memory_gib"] = round(read_peak_gib(), 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
