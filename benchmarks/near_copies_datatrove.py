#!/usr/bin/env python3
"""Remove near copies with datatrove's MinHash, for comparison with `curation_scale.py near`.

Usage: PYTHON benchmarks/near_copies_datatrove.py ROWS.jsonl ROWS

PYTHON has datatrove, spacy, xxhash before 3.6, tokenizers and orjson. The signatures have datatrove's defaults: 14 bands of 8
hashes of word 5-grams; digits stay. Two processes work on halves of the rows. Prints a row of the table of `curation_scale.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers.jsonl import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.text import TextNormConfig

WORKERS = 2


def write_parts(rows: Path, count: int, folder: Path) -> None:
    """Write the texts of the rows to a file for each worker."""
    folder.mkdir()
    with rows.open(encoding="utf-8") as lines:
        for part in range(WORKERS):
            with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
                for line in itertools.islice(lines, count // WORKERS):
                    file.write(json.dumps({"text": json.loads(line)["query"]}) + "\n")


def remove_near_copies(folder: Path) -> None:
    """Run the four pipelines: signatures, bands, clusters, and the filter."""
    config = MinhashConfig(norm_config=TextNormConfig(norm_numbers=False))  # the words of the rows differ by their digits
    reader = JsonlReader(str(folder / "in"))
    pipelines = [
        ([reader, MinhashDedupSignature(str(folder / "signatures"), config=config, language="eng")], WORKERS),
        ([MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)], config.num_buckets),
        ([MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config)], 1),
        ([reader, MinhashDedupFilter(str(folder / "remove")), JsonlWriter(str(folder / "out"), compression=None)], WORKERS),
    ]
    for i, (pipeline, tasks) in enumerate(pipelines):
        LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=WORKERS, logging_dir=str(folder / f"log{i}"), start_method="spawn"
        ).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", metavar="ROWS.jsonl", type=Path, help="file of the rows")
    parser.add_argument("count", metavar="ROWS", type=int, help="number of rows in the file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_parts(args.rows, args.count, folder / "in")
        start = time.monotonic()
        cpu_start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        remove_near_copies(folder)
        seconds = time.monotonic() - start
        num_remaining = sum(len(path.read_bytes().splitlines()) for path in (folder / "out").rglob("*.jsonl"))
    children, own = (resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    cpu = children.ru_utime + children.ru_stime + own.ru_utime - cpu_start
    peak = max(children.ru_maxrss, own.ru_maxrss) / 2**10
    print(f"| near, datatrove | {args.count:,} | {num_remaining:,} | {seconds:,.0f} | {cpu:,.0f} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
