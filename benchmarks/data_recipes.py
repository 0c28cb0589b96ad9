#!/usr/bin/env python3
"""Measure how data recipes change scores: mined negatives, consistency filters, label documents, single-source batches.

    python benchmarks/data_recipes.py BASE DATA MINER TASKS.py [--steps 60] [--seeds 3] [--only NAME ...] [--out DIR]

BASE is a small decoder folder. DATA is a folder with ag_news/pairs_train.jsonl and ocnli_zh/train.jsonl (pairs) and
banking77/train.jsonl (texts and labels). MINER is any model that mines negatives, such as MiniLM. TASKS.py defines the MTEB
tasks AGNewsTitleRetrieval, STSBenchmarkMultilingualSTS and Banking77Classification (see benchmarks/score.py). Each row of
the table is trained from BASE, once per seed. Prints a Markdown table (mean and standard deviation of each score over the
seeds) and, on the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from objectives import mine_pairs, parse_and_set_up
from score import load_tasks
from table_cells import format_mean

from jaxembed.evaluation.encoders import load_encoder
from jaxembed.evaluation.tasks import score_tasks

TASKS = ("AGNewsTitleRetrieval", "STSBenchmarkMultilingualSTS", "Banking77Classification")


def list_rows(data: Path, miner: str, folder: Path) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Return the rows of the table.

    Args:
        data: Folder of the training files.
        miner: Model that mines negatives.
        folder: Folder for the mined files.

    Returns:
        By the name of a row: the names of the tasks that score it, and its changes to the config.
    """
    news, ocnli = data / "ag_news" / "pairs_train.jsonl", data / "ocnli_zh" / "train.jsonl"
    banking = {"path": str(data / "banking77" / "train.jsonl"), "name": "banking"}

    def choose_sources(*sources: dict[str, Any], negatives: int = 3, **keys: Any) -> dict[str, Any]:
        return {"data": {"max_length": 128, "hard_negatives": negatives, "sources": list(sources), **keys}}

    def mix_sources(ratio: float) -> dict[str, Any]:
        batching = {"kind": "semi_homogeneous", "ratio": ratio}
        return choose_sources({"path": str(news)}, {"path": str(ocnli), "name": "ocnli"}, banking, batching=batching)

    mined_news = mine_pairs(miner, news, folder / "news.jsonl")
    mined_ocnli = mine_pairs(miner, ocnli, folder / "ocnli.jsonl")
    top_50 = mine_pairs(miner, news, folder / "consistent.jsonl", "--consistency-top-k=50")
    top_2 = mine_pairs(miner, news, folder / "most.jsonl", "--consistency-top-k=2")
    return {
        "AG News, no hard negatives": ([TASKS[0]], choose_sources({"path": str(news)}, negatives=0)),
        "AG News, mined": ([TASKS[0]], choose_sources({"path": mined_news, "name": "mined"})),
        "AG News, mined, positive in the top 50": ([TASKS[0]], choose_sources({"path": top_50, "name": "mined"})),
        "AG News, mined, positive in the top 2": ([TASKS[0]], choose_sources({"path": top_2, "name": "mined"})),
        "OCNLI, no hard negatives": ([TASKS[1]], choose_sources({"path": str(ocnli)}, negatives=0)),
        "OCNLI, its contradictions": ([TASKS[1]], choose_sources({"path": str(ocnli)})),
        "OCNLI, mined": ([TASKS[1]], choose_sources({"path": mined_ocnli, "name": "mined"})),
        "Banking77, examples": ([TASKS[2]], choose_sources({**banking, "label_documents": "examples"})),
        "Banking77, labels": ([TASKS[2]], choose_sources({**banking, "label_documents": "labels"})),
        **{f"all three, semi_homogeneous, ratio {ratio}": (list(TASKS), mix_sources(ratio)) for ratio in (0, 0.5, 1)},
    }


def score_model(model: str, tasks_file: str, names: list[str]) -> dict[str, float]:
    """Return the score of a model on each of the named tasks."""
    return {task: result["score"] for task, result in score_tasks(load_encoder(model), load_tasks(tasks_file, names)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="small decoder folder")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the training files")
    parser.add_argument("miner", metavar="MINER", help="model that mines negatives")
    parser.add_argument("tasks_file", metavar="TASKS.py", help="Python file with a function tasks(names)")
    args, trainer = parse_and_set_up(parser)
    print("| trained on | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS), flush=True)
    all_scores: dict[str, Any] = {"untrained": [score_model(args.base, args.tasks_file, list(TASKS))]}
    print_row("untrained", all_scores["untrained"])
    for name, (tasks, changes) in list_rows(args.data, args.miner, trainer.folder).items():
        if args.only and not any(part in name for part in args.only):
            continue
        runs = [trainer.train_row(name, changes, seed, "", args.steps) for seed in range(args.seeds)]
        all_scores[name] = [score_model(run, args.tasks_file, tasks) for run in runs]
        print_row(name, all_scores[name])
    print(json.dumps(all_scores))


def print_row(name: str, runs: list[dict[str, float]]) -> None:
    """Print mean and standard deviation of each task's score over the runs; a task without a score has an empty cell."""
    cells = []
    for task in TASKS:
        values = [run[task] for run in runs if task in run]
        cells.append(format_mean(values, 4) if values else "")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
