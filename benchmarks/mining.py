#!/usr/bin/env python3
"""The search behind mining, beside FAISS's flat index: random unit vectors, the same in both, in float32.

    python benchmarks/mining.py [--queries 100000] [--documents 500000] [--width 384] [--k 100] [--repeats 1]

Each side has a process of its own with every core; they take turns, --repeats times. Memory is that of a process at its
peak beyond what it held when the vectors were there and the libraries loaded. Needs faiss (pip install faiss-cpu).
Prints a Markdown table of medians and, on the last line, one JSON object, with the share of neighbours that both found.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from vs_sentence_transformers import measured

from jaxembed.search.nearest import MEMORY_MB, search

SIDES = ("faiss", "jaxembed")


def peak() -> float:
    """GiB that this process held at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clocks() -> np.ndarray:
    """Seconds by the clock, and those that all cores together spent on this process."""
    return np.array([time.perf_counter(), time.process_time()])


def vectors(count: int, width: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    drawn /= np.sqrt(np.einsum("nd,nd->n", drawn, drawn))[:, None]
    return drawn


def run(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds, those of all cores together, and GiB of one search, compiling and building the index included; writes the
    rows.
    """
    queries, documents = vectors(args.queries, args.width, 0), vectors(args.documents, args.width, 1)
    if side == "faiss":
        import faiss

        held, began = peak(), clocks()
        index = faiss.IndexFlatIP(args.width)
        index.add(documents)
        rows = index.search(queries, args.k)[1]
    else:
        search(queries[:1], documents[:1], 1)  # loads the compiler
        held, began = peak(), clocks()
        rows = search(queries, documents, args.k, memory_mb=args.memory_mb).rows
    (seconds, of_cores), memory = clocks() - began, peak() - held
    np.save(args.out / f"{side}.npy", rows.astype(np.int32))
    return {"seconds": seconds, "core_seconds": of_cores, "gib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory-mb", type=int, default=MEMORY_MB, help="of jaxembed's search")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # the part of this script's own processes
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args.side, args)))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    sizes = [
        f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("queries", "documents", "width", "k", "memory_mb")
    ]
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                found[side].append(measured([__file__, *sizes, f"--side={side}", f"--out={folder}"])[0])
        rows = [np.load(Path(folder) / f"{side}.npy") for side in SIDES]
    shared = float(np.mean([np.isin(ours, theirs).mean() for theirs, ours in zip(*rows, strict=True)]))
    median = {side: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for side, runs in found.items()}
    print("| search | seconds | core seconds | memory beside the vectors |\n|---|---|---|---|")
    for side, of_side in median.items():
        print(f"| {side} | {of_side['seconds']:.1f} | {of_side['core_seconds']:.1f} | {of_side['gib']:.2f} GiB |")
    ratio = median["faiss"]["seconds"] / median["jaxembed"]["seconds"]
    print(json.dumps({**median, "times_faster": round(ratio, 3), "shared": round(shared, 6)}))


if __name__ == "__main__":
    main()
