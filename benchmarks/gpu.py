#!/usr/bin/env python3
"""Compare jaxembed with sentence-transformers and its SDPA attention on one NVIDIA GPU, in at most 8 minutes on an H200.

    python benchmarks/gpu.py [--parts kernels full lora large_batch encode] [--minutes 8] [--tiny]

Weights and texts are random, so nothing is downloaded. Lengths of texts are log-normal with a mean of 128 tokens, truncated to
512 (large_batch: 64). Both sides compute the same texts in bfloat16.

- kernels: error of every attention kernel against einsum in float32, and its time forward and backward. Under 3 minutes.
- full: fine-tuning of all parameters of a Qwen2-0.5B, 64 pairs a step.
- lora: adapters of rank 16 on a frozen Mistral-7B, 32 pairs a step, layers recomputed.
- large_batch: one step of 32,768 pairs with a Qwen2-0.5B and gradient caching (jaxembed only).
- encode: texts to vectors with a Qwen2-0.5B, tokenization included.

Each side of a part runs in its own process, because JAX and PyTorch both reserve the GPU's memory. If a side fails or runs out
of time, the table says so, and the others continue. Tokens are useful ones, without padding. MFU counts the matmuls of useful
tokens once, over the chip's published rate. Needs torch, sentence-transformers and peft. --tiny is a dry run
that a CPU finishes in seconds. Prints Markdown tables and, on the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # jaxembed need not be installed

from gpu_workload import WORKLOADS

PARTS = ("kernels", *WORKLOADS)
SIDES = ("jaxembed", "sentence-transformers")
MODULES = {"jaxembed": "gpu_jaxembed", "sentence-transformers": "gpu_sentence_transformers"}
ONE_SIDED_PARTS = ("kernels", "large_batch")


def run_task(part: str, side: str, is_tiny: bool) -> dict[str, Any]:
    """Measure one side of a part in this process. Return what the module of the side measures."""
    module = importlib.import_module(MODULES[side])
    if part == "kernels":
        return dict(module.measure_kernels(is_tiny))
    work = WORKLOADS[part].shrink() if is_tiny else WORKLOADS[part]
    return dict(module.measure_encoding(work) if part == "encode" else module.measure_training(work))


def run_in_process(part: str, side: str, is_tiny: bool, seconds: float) -> dict[str, Any]:
    """Measure one side of a part in its own process.

    Args:
        part: One of `PARTS`.
        side: One of `SIDES`.
        is_tiny: Whether this is a dry run.
        seconds: Time limit.

    Returns:
        The result of `run_task`, or {"failed": reason}.
    """
    command = [sys.executable, __file__, "--task", part, side, *(["--tiny"] if is_tiny else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {seconds:.0f} s"}
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-30:]), file=sys.stderr)
        return {"failed": find_error_line(done.stderr) or f"exit code {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def find_error_line(stderr: str) -> str:
    """Return the error of a traceback, such as `ValueError: message`; empty if there is none."""
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", stderr, re.MULTILINE)
    return errors[-1][:300] if errors else ""


def find_peak_flops(device: str | None) -> float | None:
    """Return the published bfloat16 FLOP/s of a device by JAX's name, or None if it is not known."""
    from jaxembed.devices.chips import find_chip

    chip = find_chip(device or "")
    return chip.peak_flops if chip else None


def format_number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def print_kernels(result: dict[str, Any]) -> None:
    """Print the table of the kernels."""
    print("\n| attention | mask | kernel | relative error | ms, forward and backward |\n|---|---|---|---|---|")
    for row in result.get("kernels", []):
        error = row.get("failed") or format_number(row["error"], 4)
        columns = [row["model"], row["mask"], row["kernel"], error, format_number(row["milliseconds"], 2)]
        print("| " + " | ".join(columns) + " |")
    for name, fault in result.get("faults", {}).items():
        print(f"\n{name}: {fault or 'works here'}")


def print_sides(results: dict[str, dict[str, Any]], peak: float | None) -> None:
    """Print the table of all parts but the kernels, and add tokens per second and MFU to the results."""
    print("\n| part | side | seconds | useful tokens/s | MFU | peak GiB | padding |\n|---|---|---|---|---|---|---|")
    for name, result in results.items():
        part, side = name.split(":")
        if "failed" in result:
            print(f"| {part} | {side} | failed: {result['failed']} | | | | |")
            continue
        result["tokens_per_second"] = result["tokens"] / result["seconds"]
        if peak and "flops" in result:
            result["mfu"] = result["flops"] / result["seconds"] / peak
        padding = 1 - result["tokens"] / result["computed_tokens"] if "computed_tokens" in result else None
        columns = [
            format_number(result["seconds"], 3), format_number(result["tokens_per_second"], 0),
            format_number(result.get("mfu"), 3), format_number(result["gib"]), format_number(padding, 3),
        ]  # fmt: skip
        print(f"| {part} | {side} | " + " | ".join(columns) + " |")


def list_ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return jaxembed's tokens per second over those of sentence-transformers, by part."""
    speeds = {name: result.get("tokens_per_second") for name, result in results.items()}
    pairs = {part: [speeds.get(f"{part}:{side}") for side in SIDES] for part in WORKLOADS}
    return {part: round(ours / theirs, 3) for part, (ours, theirs) in pairs.items() if ours and theirs}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="dry run at tiny sizes")
    # Used by the processes that this script starts.
    parser.add_argument("--task", nargs=2, metavar=("PART", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.task:
        print(json.dumps(run_task(args.task[0], args.task[1], args.tiny)))
        return
    deadline = time.monotonic() + 60 * args.minutes
    results: dict[str, dict[str, Any]] = {}
    for part in args.parts:
        for side in SIDES[:1] if part in ONE_SIDED_PARTS else SIDES:
            result = run_in_process(part, side, args.tiny, deadline - time.monotonic())
            results[f"{part}:{side}"] = result
            print(f"{part} {side}: {result.get('failed', 'done')}", file=sys.stderr, flush=True)
    kernels = results.pop("kernels:jaxembed", {})
    device = next((result["device"] for result in (kernels, *results.values()) if "device" in result), None)
    print(f"device: {device}")
    print_kernels(kernels)
    print_sides(results, find_peak_flops(device))
    print(json.dumps({"device": device, "ratios": list_ratios(results), "kernels": kernels, "parts": results}))


if __name__ == "__main__":
    main()
