#!/usr/bin/env python3
"""How fast the data plan gives the ids of batches, for every kind of batch.

    python benchmarks/plan.py [--batches 100000] [--batch-size 8192]

Sources of 20 million, 1 million, 300,000 and 9,000 examples, which hold no data: the plan is arithmetic on their sizes.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from jaxembed.config import BatchingConfig, SourceConfig
from jaxembed.data.batch_plan import BatchPlan

SIZES = {"a": (20_000_000, 3.0), "b": (1_000_000, 1.0), "c": (300_000, 0.5), "d": (9_000, 0.1)}  # examples and weight


class Sized:
    """As much of a source as the plan asks."""

    def __init__(self, name: str, size: int, weight: float):
        self.config, self.name, self.size = SourceConfig(path=name, weight=weight), name, size

    def __len__(self) -> int:
        return self.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=8192)
    args = parser.parse_args()
    sources: Any = [Sized(name, size, weight) for name, (size, weight) in SIZES.items()]
    print(f"| kind | seconds for {args.batches:,} batches of {args.batch_size:,} | ms for the next, after a restart |")
    print("|---|---|---|")
    for kind in ("blended", "homogeneous", "semi_homogeneous"):
        batching = BatchingConfig(kind=kind)
        plan = BatchPlan(sources, args.batch_size, 0, batching=batching)
        began = time.perf_counter()
        for step in range(args.batches):
            plan[step]
        whole = time.perf_counter() - began
        plan = BatchPlan(sources, args.batch_size, 0, batching=batching)
        began = time.perf_counter()
        plan[args.batches]
        print(f"| {kind} | {whole:.1f} | {1000 * (time.perf_counter() - began):.0f} |", flush=True)


if __name__ == "__main__":
    main()
