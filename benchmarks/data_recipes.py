#!/usr/bin/env python3
"""What data recipes do to scores: mined negatives, consistency filtering, labels or examples, batches of one source.

    python benchmarks/data_recipes.py BASE DATA MINER TASKS.py [--steps 60] [--seeds 3] [--only NAME ...] [--out DIR]

BASE is a small decoder folder; DATA a folder with ag_news/pairs_train.jsonl and ocnli_zh/train.jsonl (main format) and
banking77/train.jsonl (text, label); MINER any model, such as MiniLM, by which negatives are mined; TASKS.py gives MTEB tasks:
AGNewsTitleRetrieval, STSBenchmarkMultilingualSTS, Banking77Classification. Each row is trained from BASE once a seed.
Prints a Markdown table, mean and standard deviation of each score over seeds, and last one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from objectives import mined, opened
from score import load_tasks

from jaxembed.evaluate import load_encoder
from jaxembed.evaluation.mteb_encoder import evaluate

TASKS = ("AGNewsTitleRetrieval", "STSBenchmarkMultilingualSTS", "Banking77Classification")


def rows(data: Path, miner: str, folder: Path) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """A row's name -> the tasks that score it, and what it changes."""
    news, ocnli = data / "ag_news" / "pairs_train.jsonl", data / "ocnli_zh" / "train.jsonl"
    banking = {"path": str(data / "banking77" / "train.jsonl"), "name": "banking"}
    own = {"name": "mined"}

    def sources(*chosen: dict[str, Any], negatives: int = 3, **more: Any) -> dict[str, Any]:
        return {"data": {"max_length": 128, "hard_negatives": negatives, "sources": list(chosen), **more}}

    def blend(ratio: float) -> dict[str, Any]:
        batching = {"kind": "semi_homogeneous", "ratio": ratio}
        return sources({"path": str(news)}, {"path": str(ocnli), "name": "ocnli"}, banking, batching=batching)

    of_news, of_ocnli = mined(miner, news, folder / "news.jsonl"), mined(miner, ocnli, folder / "ocnli.jsonl")
    consistent = mined(miner, news, folder / "consistent.jsonl", "--consistency-top-k=50")
    most = mined(miner, news, folder / "most.jsonl", "--consistency-top-k=2")
    return {
        "AG News, no hard negatives": ([TASKS[0]], sources({"path": str(news)}, negatives=0)),
        "AG News, mined": ([TASKS[0]], sources({"path": of_news, **own})),
        "AG News, mined, positive in the top 50": ([TASKS[0]], sources({"path": consistent, **own})),
        "AG News, mined, positive in the top 2": ([TASKS[0]], sources({"path": most, **own})),
        "OCNLI, no hard negatives": ([TASKS[1]], sources({"path": str(ocnli)}, negatives=0)),
        "OCNLI, its contradictions": ([TASKS[1]], sources({"path": str(ocnli)})),
        "OCNLI, mined": ([TASKS[1]], sources({"path": of_ocnli, **own})),
        "Banking77, examples": ([TASKS[2]], sources({**banking, "label_documents": "examples"})),
        "Banking77, labels": ([TASKS[2]], sources({**banking, "label_documents": "labels"})),
        **{f"all three, {ratio:.0%} of a batch of one source": (list(TASKS), blend(ratio)) for ratio in (0, 0.5, 1)},
    }


def scores_of(model: str, tasks_file: str, names: list[str]) -> dict[str, float]:
    return {task: told["score"] for task, told in evaluate(load_encoder(model), load_tasks(tasks_file, names)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("miner")
    parser.add_argument("tasks_file", metavar="TASKS.py")
    args, bench = opened(parser)
    print("| trained on | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS), flush=True)
    found: dict[str, Any] = {"untrained": [scores_of(args.base, args.tasks_file, list(TASKS))]}
    show("untrained", found["untrained"])
    for name, (tasks, changes) in rows(args.data, args.miner, bench.folder).items():
        if args.only and not any(part in name for part in args.only):
            continue
        runs = [bench.run(name, changes, seed, "", args.steps) for seed in range(args.seeds)]
        found[name] = [scores_of(run, args.tasks_file, tasks) for run in runs]
        show(name, found[name])
    print(json.dumps(found))


def show(name: str, runs: list[dict[str, float]]) -> None:
    cells = []
    for task in TASKS:
        values = [run[task] for run in runs if task in run]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
