#!/usr/bin/env python3
"""What a source of many rows costs: seconds to open it, draws a second, and the memory that is held.

    python benchmarks/rows.py [--rows 1000000 20000000] [--shape pairs] [--folder DIR]

Writes JSONL files of short synthetic rows into DIR (a temporary one; 20 million pairs take 1.9 GB, their index 0.3 GB). Each is
opened twice, each time in a process of its own: first without an index, then with it; 100,000 examples are drawn at random
each time. Memory is what the process holds for itself (RssAnon: no mapped file), the most that was seen in samples 10 ms apart,
beside what it held before the opening. Prints a Markdown table and, on the last line, one JSON object.
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

from jaxembed.config import PythonPackagesConfig, SourceConfig
from jaxembed.data.sources import open_source

DRAWS = 100_000
LABELS = 150


def a_row(i: int, shape: str) -> str:
    if shape == "labels":
        return f'{{"text": "the text of row {i}", "label": "label {i * 7919 % LABELS}"}}\n'
    if shape == "scored_pairs":
        return f'{{"sentence1": "one of row {i}", "sentence2": "two of row {i}", "score": {i * 7919 % 6}}}\n'
    return f'{{"query": "query of row {i}", "pos": ["its answer {i}"], "neg": ["no answer {i}"]}}\n'


def held() -> float:
    """MiB that this process holds for itself."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024


class Peak(threading.Thread):
    """The most that is held from `start` to `join`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = held(), threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, held())

    def join(self, timeout: float | None = None) -> None:
        self._done.set()
        super().join(timeout)


def opening(path: Path) -> dict[str, float]:
    """Opens a file and draws from it."""
    before, peak = held(), Peak()
    peak.start()
    began = time.perf_counter()
    source = open_source(SourceConfig(path=str(path)), PythonPackagesConfig(), path.parent)
    opened = time.perf_counter()
    rng = np.random.default_rng(0)
    for index in rng.integers(len(source), size=DRAWS):
        source.draw(int(index), rng, 1)
    drawn = time.perf_counter()
    peak.join()
    return {"seconds": opened - began, "draws_per_second": DRAWS / (drawn - opened), "before": before, "most": peak.most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 20_000_000])
    parser.add_argument("--shape", choices=["pairs", "labels", "scored_pairs"], default="pairs")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(opening(args.open)))
        return
    print("| rows | file | opening | seconds | draws a second | held before | most held |\n|---|---|---|---|---|---|---|")
    results = []
    for count in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "rows.jsonl"
            with path.open("w") as file:
                file.writelines(a_row(i, args.shape) for i in range(count))
            time.sleep(0.1)  # an index as old as its file is not trusted
            size = path.stat().st_size / 2**20
            for name in ("first", "later"):
                command = [sys.executable, __file__, "--open", str(path)]
                told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                results.append({"rows": count, "shape": args.shape, "opening": name, "file": size, **told})
                print(
                    f"| {count:,} | {size:,.0f} MiB | {name} | {told['seconds']:.3f} | {told['draws_per_second']:,.0f} "
                    f"| {told['before']:.0f} MiB | {told['most']:.0f} MiB |",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
