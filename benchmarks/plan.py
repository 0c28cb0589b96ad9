#!/usr/bin/env python3
"""Measure how fast the batch plan returns the example ids of batches, for each kind of batching.

    python benchmarks/plan.py [--batches 100000] [--batch-size 8192]

The sources have 20 million, 1 million, 300,000 and 9,000 examples. They contain no data, because the plan is arithmetic on
their sizes. Prints a Markdown table: seconds for all batches, and milliseconds for the next batch after a restart.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from jaxembed.config import BatchingConfig, SourceConfig
from jaxembed.data.batch_plan import BatchPlan

SOURCES = {"a": (20_000_000, 3.0), "b": (1_000_000, 1.0), "c": (300_000, 0.5), "d": (9_000, 0.1)}  # name: (examples, weight)


class EmptySource:
    """A source without data: it has only the attributes that the plan reads."""

    def __init__(self, name: str, size: int, weight: float):
        self.config, self.name, self.digest, self.size = SourceConfig(path=name, weight=weight), name, "", size

    def __len__(self) -> int:
        return self.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000, help="number of batches (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8192, help="queries per batch (default: %(default)s)")
    args = parser.parse_args()
    sources: Any = [EmptySource(name, size, weight) for name, (size, weight) in SOURCES.items()]
    print(f"| kind | seconds for {args.batches:,} batches of {args.batch_size:,} | ms for the next, after a restart |")
    print("|---|---|---|")
    for kind in ("blended", "homogeneous", "semi_homogeneous"):
        batching = BatchingConfig(kind=kind)
        plan = BatchPlan(sources, args.batch_size, 0, batching=batching)
        start = time.perf_counter()
        for step in range(args.batches):
            plan[step]
        seconds = time.perf_counter() - start
        plan = BatchPlan(sources, args.batch_size, 0, batching=batching)
        start = time.perf_counter()
        plan[args.batches]
        print(f"| {kind} | {seconds:.1f} | {1000 * (time.perf_counter() - start):.0f} |", flush=True)


if __name__ == "__main__":
    main()
