#!/usr/bin/env python3
"""Compare the exact search behind mining with FAISS's flat index, on the same random unit vectors in float32.

    python benchmarks/mining.py [--queries 100000] [--documents 500000] [--width 384] [--k 100] [--repeats 1]

The sides are FAISS, jaxembed, and jaxembed without its first pass in bfloat16, which it has on CPUs with instructions for it.
Each side runs in its own process with all cores. The sides take turns, --repeats times. Memory is the peak of the process
minus its peak after creating the vectors and loading the libraries. Needs faiss (pip install faiss-cpu). Prints a Markdown
table of medians (seconds, CPU seconds, memory) and, on the last line, one JSON object. For each of the other sides, it also has
the ratio of the times (`times_faster`), and the fraction of its neighbors that jaxembed found (`shared`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from script_runs import read_peak_gib, run_script

from jaxembed.search import two_pass
from jaxembed.search.nearest import DEFAULT_MEMORY_MB, search

SIDES = ("faiss", "float32", "jaxembed")


def read_clocks() -> np.ndarray:
    """Return two clocks in seconds, [2]: wall time, and the CPU time of this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


def draw_unit_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """Draw unit vectors [count, width] in float32."""
    vectors = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    vectors /= np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return vectors


def measure_search(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one search, including compilation or building the index. Write its document rows [queries, k] to --out.

    Returns:
        Seconds, core seconds, and memory besides the vectors in GiB.
    """
    queries, documents = draw_unit_vectors(args.queries, args.width, 0), draw_unit_vectors(args.documents, args.width, 1)
    if side == "faiss":
        import faiss

        memory_before, clocks_before = read_peak_gib(), read_clocks()
        index = faiss.IndexFlatIP(args.width)
        index.add(documents)
        rows = index.search(queries, args.k)[1]
    else:
        if side == "float32":
            two_pass.MIN_SEARCH_FLOPS = sys.maxsize
        search(queries[:1], documents[:1], 1)  # initializes JAX and its compiler
        memory_before, clocks_before = read_peak_gib(), read_clocks()
        rows = search(queries, documents, args.k, memory_mb=args.memory_mb).indices
    (seconds, core_seconds), memory = read_clocks() - clocks_before, read_peak_gib() - memory_before
    np.save(args.out / f"{side}.npy", rows.astype(np.int32))
    return {"seconds": seconds, "core_seconds": core_seconds, "gib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--documents", type=int, default=500_000, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="dimensions of a vector (default: %(default)s)")
    parser.add_argument("--k", type=int, default=100, help="neighbors per query (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="searches per side (default: %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=DEFAULT_MEMORY_MB, help="memory limit of jaxembed's search")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # used by the processes that this script starts
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_search(args.side, args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    options = [
        f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("queries", "documents", "width", "k", "memory_mb")
    ]
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                runs[side].append(run_script([__file__, *options, f"--side={side}", f"--out={folder}"])[0])
        rows = {side: np.load(Path(folder) / f"{side}.npy") for side in SIDES}
    shared = {
        side: float(np.mean([np.isin(theirs, ours).mean() for theirs, ours in zip(rows[side], rows["jaxembed"], strict=True)]))
        for side in SIDES[:-1]
    }
    median = {
        side: {name: statistics.median(run[name] for run in side_runs) for name in side_runs[0]}
        for side, side_runs in runs.items()
    }
    print("| search | seconds | CPU seconds | memory besides the vectors |\n|---|---|---|---|")
    for side, medians in median.items():
        print(f"| {side} | {medians['seconds']:.1f} | {medians['core_seconds']:.1f} | {medians['gib']:.2f} GiB |")
    comparisons = {
        side: {
            "times_faster": round(median[side]["seconds"] / median["jaxembed"]["seconds"], 3),
            "shared": round(shared[side], 6),
        }
        for side in SIDES[:-1]
    }
    print(json.dumps({"sides": median, "against": comparisons}))


if __name__ == "__main__":
    main()
