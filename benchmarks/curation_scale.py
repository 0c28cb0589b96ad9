"""Time and peak memory of `jaxembed curate` on synthetic rows, each size in a separate process.

Usage: python benchmarks/curation_scale.py STEPS ROWS [ROWS ...] [--words N] [--memory-mb N] [--datatrove PYTHON]

STEPS is `text` (clean, quality, negatives, exact duplicates, balance) or `near` (near duplicates of queries). PYTHON is the
interpreter of an environment for `near_copies_datatrove.py`, which then processes the same rows.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.curation import CurateConfig
from jaxembed.curate import make_context
from jaxembed.curation.engine import curate
from jaxembed.data.jsonl import write_jsonl

VOCABULARY = 20_000
STEPS: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"name": "clean"}, {"name": "quality", "min_chars": 3}, {"name": "negatives"}, {"name": "duplicates"},
        {"name": "balance", "share": 0.9},
    ],
    "near": [{"name": "duplicates", "of": "queries", "match": "near"}],
}  # fmt: skip


def iter_synthetic(count: int, words: int) -> Iterable[dict[str, Any]]:
    """Yield rows of random words. Every tenth row is a near copy of the previous one."""
    rng = np.random.default_rng(0)
    text: list[str] = []
    for i in range(count):
        if i % 10 or not text:
            text = [f"w{n}" for n in rng.integers(VOCABULARY, size=words)]
        yield {"query": " ".join(text) + (" again" if i % 10 == 0 else ""), "pos": [" ".join(text[:8])]}


def measure(name: str, count: int, words: int, memory_mb: int) -> None:
    """Curate rows in this process, and print the row of the table.

    Args:
        name: Key of `STEPS`.
        count: Number of rows.
        words: Words of a query.
        memory_mb: Key `memory_mb` of the config.
    """
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_jsonl(folder / "rows.jsonl", iter_synthetic(count, words))
        sources = [{"path": str(folder / "rows.jsonl")}]
        tree = {"out": str(folder / "out"), "memory_mb": memory_mb, "sources": sources, "steps": STEPS[name]}
        start, cpu_start = time.monotonic(), time.process_time()
        result = curate(CurateConfig.model_validate(tree), make_context(folder / "cache"), "benchmark")
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"| {name} | {count:,} | {result['rows']['rows']['out']:,} | {seconds:,.0f} | {cpu:,.0f} | {peak:,.0f} |", flush=True)


def run_datatrove(python: str, count: int, words: int) -> None:
    """Remove the near copies of the same rows with datatrove, which prints its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_jsonl(path, iter_synthetic(count, words))
        script = str(Path(__file__).with_name("near_copies_datatrove.py"))
        subprocess.run([python, script, str(path), str(count)], check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", choices=sorted(STEPS), help="steps to run")
    parser.add_argument("rows", metavar="ROWS", nargs="+", type=int, help="number of rows")
    parser.add_argument("--words", type=int, default=16, help="words of a query (default: %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=64, help="memory_mb of the config (default: %(default)s)")
    parser.add_argument("--datatrove", metavar="PYTHON", help="also run datatrove, with this Python")
    # Used by the processes that this script starts.
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.steps, args.rows[0], args.words, args.memory_mb)
        return
    print("| steps | rows | kept | seconds | CPU seconds | peak memory, MiB |\n|---|---|---|---|---|---|", flush=True)
    for count in args.rows:
        options = ["--words", str(args.words), "--memory-mb", str(args.memory_mb), "--child"]
        subprocess.run([sys.executable, __file__, args.steps, str(count), *options], check=True, stderr=subprocess.DEVNULL)
        if args.datatrove:
            run_datatrove(args.datatrove, count, args.words)


if __name__ == "__main__":
    main()
