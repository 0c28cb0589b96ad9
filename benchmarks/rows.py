#!/usr/bin/env python3
"""Measure the cost of a source with many rows: seconds to open it, examples drawn per second, and memory.

    python benchmarks/rows.py [--rows 1000000 20000000] [--shape pairs] [--folder DIR]

Writes JSONL files of short synthetic rows to DIR (default: a temporary folder). 20 million pairs take 1.9 GB, their index
0.3 GB. Each file is opened twice, each time in a new process: first without an index, then with it. Each time, 100,000
examples are drawn at random. Memory is the anonymous memory of the process (RssAnon, without mapped files): the peak of
samples 10 ms apart, and the value before opening. Prints a Markdown table and, on the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.sources import open_source

DRAW_COUNT = 100_000
LABEL_COUNT = 150


def build_row(i: int, shape: str) -> str:
    """Return row `i` of a file, as a line of JSON. `shape` is one of the choices of --shape."""
    if shape == "labels":
        return f'{{"text": "the text of row {i}", "label": "label {i * 7919 % LABEL_COUNT}"}}\n'
    if shape == "scored_pairs":
        return f'{{"sentence1": "one of row {i}", "sentence2": "two of row {i}", "score": {i * 7919 % 6}}}\n'
    return f'{{"query": "query of row {i}", "pos": ["its answer {i}"], "neg": ["no answer {i}"]}}\n'


def read_anonymous_mib() -> float:
    """Return the anonymous memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024


class PeakMemory(threading.Thread):
    """Thread that measures the peak anonymous memory between `start` and `join`, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib, self._is_done = read_anonymous_mib(), threading.Event()

    def run(self) -> None:
        while not self._is_done.wait(0.01):
            self.peak_mib = max(self.peak_mib, read_anonymous_mib())

    def join(self, timeout: float | None = None) -> None:
        self._is_done.set()
        super().join(timeout)


def measure_opening(path: Path) -> dict[str, float]:
    """Open a file as a source and draw examples from it.

    Returns:
        The seconds to open it, the draws per second, and the memory before and at its peak ("most") in MiB.
    """
    before, memory = read_anonymous_mib(), PeakMemory()
    memory.start()
    start = time.perf_counter()
    source = open_source(SourceConfig(path=str(path)), path.parent)
    opened = time.perf_counter()
    rng = np.random.default_rng(0)
    for index in rng.integers(len(source), size=DRAW_COUNT):
        source.draw(int(index), rng, 1)
    drawn = time.perf_counter()
    memory.join()
    return {
        "seconds": opened - start,
        "draws_per_second": DRAW_COUNT / (drawn - opened),
        "before": before,
        "most": memory.peak_mib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 20_000_000], help="rows of each file")
    parser.add_argument("--shape", choices=["pairs", "labels", "scored_pairs"], default="pairs", help="kind of rows")
    parser.add_argument("--folder", type=Path, help="where to write the files (default: a temporary folder)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # used by the processes that this script starts
    args = parser.parse_args()
    if args.open:
        print(json.dumps(measure_opening(args.open)))
        return
    print("| rows | file | opening | seconds | draws per second | memory before | peak memory |\n|---|---|---|---|---|---|---|")
    results = []
    for count in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "rows.jsonl"
            with path.open("w") as file:
                file.writelines(build_row(i, args.shape) for i in range(count))
            time.sleep(0.1)  # the file must be older than its index
            size = path.stat().st_size / 2**20
            for name in ("first", "later"):
                command = [sys.executable, __file__, "--open", str(path)]
                measured = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                results.append({"rows": count, "shape": args.shape, "opening": name, "file": size, **measured})
                print(
                    f"| {count:,} | {size:,.0f} MiB | {name} | {measured['seconds']:.3f} | {measured['draws_per_second']:,.0f} "
                    f"| {measured['before']:.0f} MiB | {measured['most']:.0f} MiB |",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
