#!/usr/bin/env python3
"""Measure the MTEB scores of models on tasks from a local Python file, so that no data is downloaded.

    python benchmarks/score.py TASKS.py MODEL [MODEL...] [--tasks NAME ...] [--backend jax|sentence-transformers]

TASKS.py defines a function tasks(names) that returns mteb task objects. Prints one row per model and task (model, task,
score, instruction) and, on the last line, one JSON object of all scores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json

from jaxembed.evaluate import load_encoder
from jaxembed.evaluation.mteb_tasks import MtebTask
from jaxembed.evaluation.tasks import score_tasks


def load_tasks(path: str, names: list[str] | None) -> list[MtebTask]:
    """Return the MTEB tasks of a Python file: those with these names, or all for None."""
    module_spec = importlib.util.spec_from_file_location("task_file", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return [MtebTask(task) for task in module.tasks(names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks_file", metavar="TASKS.py", help="Python file with a function tasks(names)")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="run directory, model folder or hub id")
    parser.add_argument("--tasks", metavar="NAME", nargs="*", help="names of tasks (default: all of TASKS.py)")
    parser.add_argument("--backend", choices=["jax", "sentence-transformers"], default="jax", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", default="best", help="checkpoint of a run: best, last or a step (default: %(default)s)")
    args = parser.parse_args()
    scores = {}
    for model in args.models:
        encoder = load_encoder(model, args.checkpoint, args.backend)
        scores[model] = score_tasks(encoder, load_tasks(args.tasks_file, args.tasks))
        for task, result in scores[model].items():
            print(f"| {model} | {task} | {result['score']:.4f} | {result['instruction']} |", flush=True)
    print(json.dumps(scores, ensure_ascii=False))


if __name__ == "__main__":
    main()
