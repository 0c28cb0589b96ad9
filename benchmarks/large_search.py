#!/usr/bin/env python3
"""Search vectors in a file that need not fit into memory, with one process and with several.

    python benchmarks/large_search.py FILE.npy [--vectors 6000000] [--width 768] [--queries 16] [--k 100] [--memory-mb 512]

Writes FILE.npy with random float16 vectors if it does not exist (9.2 GB by default), and leaves it there. Memory is the peak
of the largest process, minus its peak before the search. Prints a Markdown table and, on the last line, one JSON object with
`equal`: whether both searches found the same documents.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from mining import draw_unit_vectors
from script_runs import read_peak_gib

from jaxembed.search.nearest import SearchResult, search
from jaxembed.search.vector_file import VectorFile, search_file

BLOCK_VECTORS = 100_000
SIGN_BIT = 0x8000  # of a float16 number


def write_file(path: Path, vectors: int, width: int) -> None:
    """Write random vectors. Blocks repeat the same vectors with different signs."""
    bits = draw_unit_vectors(BLOCK_VECTORS, width, 1).astype(np.float16).view(np.uint16)
    random = np.random.default_rng(2)
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (vectors, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, vectors, BLOCK_VECTORS):
            signs = random.choice(np.array([0, SIGN_BIT], np.uint16), width)
            file.write((bits[: vectors - start] ^ signs).data)


def measure(file: VectorFile, queries: np.ndarray, processes: int, args: argparse.Namespace) -> tuple[SearchResult, Any]:
    """Return the result of a search, and its measurements: processes, seconds, and memory in GiB."""
    before, start = read_peak_gib(), time.perf_counter()
    result = search_file(queries, file, args.k, memory_mb=args.memory_mb, processes=processes)
    seconds = time.perf_counter() - start
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return result, {
        "processes": processes,
        "seconds": round(seconds, 1),
        "gib": round(max(read_peak_gib() - before, children), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.npy", type=Path, help="file of the vectors")
    parser.add_argument("--vectors", type=int, default=6_000_000, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="dimensions of a vector (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--k", type=int, default=100, help="neighbors per query (default: %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=512, help="memory limit of the search (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="processes of the second search (default: %(default)s)")
    args = parser.parse_args()
    if not args.file.exists():
        write_file(args.file, args.vectors, args.width)
    file = VectorFile(args.file)
    queries = draw_unit_vectors(args.queries, file.shape[1], 0)
    search(queries, file.read(0, 1000), 1)  # loads the libraries
    results, runs = zip(*(measure(file, queries, count, args) for count in (1, args.processes)), strict=True)
    print("| processes | seconds | memory, GiB |\n|---|---|---|")
    for run in runs:
        print(f"| {run['processes']} | {run['seconds']} | {run['gib']} |")
    file_gib = round(args.file.stat().st_size / 2**30, 2)
    equal = bool(np.array_equal(results[0].indices, results[1].indices))
    print(json.dumps({"vectors": len(file), "gib": file_gib, "runs": runs, "equal": equal}))


if __name__ == "__main__":
    main()
