#!/usr/bin/env python3
"""Measure the MTEB scores of models on tasks from a local Python file, so that no data is downloaded.

    python benchmarks/score.py TASKS.py MODEL [MODEL...] [--tasks NAME ...] [--backend BACKEND] [--dim N ...]

TASKS.py defines a function tasks(names) that returns mteb task objects. BACKEND is jax, sentence-transformers, or mteb (an
exported folder in mteb's own wrapper of sentence-transformers, under the same prompts).

Prints one row per model and task (model, task, score, scores by width, instruction) and, on the last line, one JSON object of
all scores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.evaluation.encoders import load_encoder
from jaxembed.evaluation.mteb_submission import list_prompts
from jaxembed.evaluation.mteb_tasks import MtebTask
from jaxembed.evaluation.tasks import score_tasks
from jaxembed.evaluation.vector_cache import VectorCache

MAX_VECTOR_BYTES = 2**32  # of a task in memory; more are stored on disk


def load_tasks(path: str, names: list[str] | None) -> list[MtebTask]:
    """Return the MTEB tasks of a Python file: those with these names, or all for None."""
    module_spec = importlib.util.spec_from_file_location("task_file", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return [MtebTask(task) for task in module.tasks(names)]


def score_with_mteb(folder: str, tasks: Sequence[MtebTask], widths: Sequence[int]) -> dict[str, Any]:
    """Score an exported folder with mteb's own wrapper of sentence-transformers, under the prompts of jaxembed.

    Args:
        folder: The folder.
        tasks: The tasks.
        widths: Widths of the vectors. Empty: that of the model.

    Returns:
        Score at the largest width, scores by width, and instruction of each task.
    """
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(folder)
    prompts = list_prompts(encoder, [task.task for task in tasks])
    instructions = {task.name: encoder.prompts.choose(task.name, task.type, "mteb's own").instruction for task in tasks}
    scores: dict[str, Any] = {name: {"instruction": text, "widths": {}} for name, text in instructions.items()}
    for width in sorted(widths or [encoder.width], reverse=True):
        model = SentenceTransformer(folder, device="cpu", truncate_dim=width)
        model.prompts = {}
        wrapper = SentenceTransformerEncoderWrapper(model, model_prompts=prompts)
        for task in tasks:
            result = mteb.evaluate(
                wrapper, task.task, cache=None, show_progress_bar=False, encode_kwargs={"normalize_embeddings": True}
            ).task_results[0]
            scores[task.name]["widths"][str(width)] = float(result.get_score())
    return {name: {"score": next(iter(result["widths"].values())), **result} for name, result in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks_file", metavar="TASKS.py", help="Python file with a function tasks(names)")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="run directory, model folder or hub id")
    parser.add_argument("--tasks", metavar="NAME", nargs="*", help="names of tasks (default: all of TASKS.py)")
    backends = ["jax", "sentence-transformers", "mteb"]
    parser.add_argument("--backend", choices=backends, default="jax", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", default="best", help="checkpoint of a run: best, last or a step (default: %(default)s)")
    parser.add_argument("--dim", type=int, nargs="+", default=[], metavar="N", help="widths to score")
    args = parser.parse_args()
    cli.set_up_jax()
    scores = {}
    for model in args.models:
        tasks = load_tasks(args.tasks_file, args.tasks)
        if args.backend == "mteb":
            scores[model] = score_with_mteb(model, tasks, args.dim)
        else:
            encoder = load_encoder(model, args.checkpoint, args.backend, widths=args.dim)
            folder = Path(tempfile.gettempdir()) / f"score-vectors-{os.getpid()}"
            encoder.cache = VectorCache(
                folder, encoder.revision, encoder.width, MAX_VECTOR_BYTES, keeps_arrays=len(args.dim) > 1
            )
            scores[model] = score_tasks(encoder, tasks)
        for task, result in scores[model].items():
            by_width = ", ".join(f"{width}: {score:.5f}" for width, score in result.get("widths", {}).items())
            print(f"| {model} | {task} | {result['score']:.4f} | {by_width} | {result['instruction']} |", flush=True)
    print(json.dumps(scores, ensure_ascii=False))


if __name__ == "__main__":
    main()
