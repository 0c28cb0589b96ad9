#!/usr/bin/env python3
"""Measure the whole input pipeline of training: rows, plan, tokenization, packing and the arrays of a batch.

    python benchmarks/input_pipeline.py BASE DATA.jsonl [--batch-size 1024] [--steps 20]

BASE is a folder with a tokenizer, DATA a JSONL file of pairs. Tokens exclude padding. Core seconds are summed over all threads,
so tokens per CPU second depend less on other work on the machine than tokens per second. The last column is the share of the
core seconds that the main thread uses: everything but the tokenizer, which has its own threads. Prints a Markdown table and, on
the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from jaxembed.config import SourceConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.pipeline import iter_batches
from jaxembed.data.sources import open_source
from jaxembed.data.tokenize import TextTokenizer, load_tokenizer
from jaxembed.devices.mesh import make_all_shards


def open_pipeline(args: argparse.Namespace) -> tuple[BatchPlan, BatchBuilder]:
    """Return the plan and the builder of batches of DATA.jsonl."""
    source = open_source(SourceConfig(path=str(args.data.resolve())), args.data.parent)
    tokenizer = TextTokenizer(load_tokenizer(args.base), EmbeddingSpec(append_eos=False, max_length=args.row_length))
    sampler = BatchSampler(sources=[source], tokenizer=tokenizer, hard_negatives=0, seed=0)
    builder = BatchBuilder(sampler=sampler, row_length=args.row_length, shards=make_all_shards(1))
    return BatchPlan([source], args.batch_size, seed=0), builder


def measure_single_thread(plan: BatchPlan, builder: BatchBuilder, steps: int) -> tuple[int, float]:
    """Build batches in this thread. Return their tokens, and the share of core seconds outside the tokenizer's threads."""
    core_start, thread_start = time.process_time(), time.thread_time()
    batches = [builder(step, plan[step]) for step in range(1, 1 + steps)]
    thread_seconds, core_seconds = time.thread_time() - thread_start, time.process_time() - core_start
    return sum(batch.useful_tokens for batch in batches), thread_seconds / core_seconds


def measure_pipeline(plan: BatchPlan, builder: BatchBuilder, steps: int) -> tuple[float, float]:
    """Build the same batches as training does. Return seconds and core seconds."""
    start, core_start = time.perf_counter(), time.process_time()
    for _ in iter_batches(plan, builder, 1, 1 + steps):
        pass
    return time.perf_counter() - start, time.process_time() - core_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="folder with a tokenizer")
    parser.add_argument("data", metavar="DATA.jsonl", type=Path, help="pairs")
    parser.add_argument("--batch-size", type=int, default=1024, help="queries per batch (default: %(default)s)")
    parser.add_argument("--row-length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="batches (default: %(default)s)")
    args = parser.parse_args()
    plan, builder = open_pipeline(args)
    builder(0, plan[0])  # opens files, and starts the tokenizer's threads
    tokens, share = measure_single_thread(plan, builder, args.steps)
    seconds, core_seconds = measure_pipeline(plan, builder, args.steps)
    result = {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        "tokens_per_core_second": round(tokens / core_seconds),
        "one_thread_share": round(share, 3),
    }
    print("| tokens | tokens/s | tokens per CPU second | share of one thread |\n|---|---|---|---|")
    print(f"| {tokens:,} | {tokens / seconds:,.0f} | {tokens / core_seconds:,.0f} | {share:.2f} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
