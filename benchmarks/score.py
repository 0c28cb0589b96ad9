#!/usr/bin/env python3
"""Scores models on MTEB tasks that a Python file provides, so that no data need be downloaded.

    python benchmarks/score.py TASKS.py MODEL [MODEL...] [--tasks NAME ...] [--backend jax|sentence-transformers]

TASKS.py has a function tasks(names) that returns mteb task objects. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

from jaxembed.evaluate import load_encoder
from jaxembed.evaluation.mteb_encoder import evaluate


def load_tasks(path: str, names: list[str] | None) -> list[Any]:
    spec = importlib.util.spec_from_file_location("task_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tasks(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks_file")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--backend", choices=["jax", "sentence-transformers"], default="jax")
    parser.add_argument("--checkpoint", default="best")
    args = parser.parse_args()
    scores = {}
    for model in args.models:
        encoder = load_encoder(model, args.checkpoint, args.backend)
        scores[model] = evaluate(encoder, load_tasks(args.tasks_file, args.tasks))
        for task, result in scores[model].items():
            print(f"| {model} | {task} | {result['score']:.4f} | {result['instruction']} |", flush=True)
    print(json.dumps(scores, ensure_ascii=False))


if __name__ == "__main__":
    main()
