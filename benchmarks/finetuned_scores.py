#!/usr/bin/env python3
"""Compare the scores of models that jaxembed and sentence-transformers fine-tune from one base, on the same data.

    python benchmarks/finetuned_scores.py BASE DATA TASKS.py [--steps 60] [--seeds 3] [--tasks NAME ...] [--out DIR]

BASE is a sentence-transformers folder (all-MiniLM-L6-v2), or a decoder folder. DATA has the folders ag_news, banking77,
tweet_emotion, stsb and ocnli_zh: the pairs are title and text, two texts of one label (banking77, tweet_emotion), sentences
with a score of 4 or more, and premise and entailed sentence. TASKS.py is the file of tasks for benchmarks/score.py.

Both programs get the same pairs, batch size, steps and optimizer; each seed chooses different pairs and orders. The losses have
temperature 0.05 and in-batch negatives. sentence-transformers trains with the dropout of the base's config, jaxembed without
dropout. For each seed they train one after the other, and the program that goes first alternates. `--equal-time` also trains
jaxembed for as many steps as fit into the time of sentence-transformers (by the step times of all seeds, without steps that
compile).

The step times and scores of each finished model are stored in --out. A run that was stopped continues if it is started again
with the same options.

Prints a Markdown table (mean and standard deviation over the seeds) and, on the last line, one JSON object of all scores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonl_rows import read_rows
from script_runs import BENCHMARKS, run_script
from table_cells import format_mean
from vs_sentence_transformers import make_model_section

from jaxembed.training.metrics import read_metrics

MAX_LENGTH, WARMUP_STEPS = 128, 6
Pairs = list[tuple[str, str]]
Scores = dict[str, float]


def read_pairs(data: Path, seed: int) -> dict[str, Pairs]:
    """Return the pairs of each data set, in random order."""
    rng = random.Random(seed)
    scored = read_rows(data / "stsb" / "en" / "train.jsonl")
    pairs = {
        "ag_news": [(row["query"], row["pos"][0]) for row in read_rows(data / "ag_news" / "pairs_train.jsonl")],
        "stsb": [(row["sentence1"], row["sentence2"]) for row in scored if row["score"] >= 4],
        "ocnli": [(row["query"], row["pos"][0]) for row in read_rows(data / "ocnli_zh" / "train.jsonl")],
    }
    for name in ("banking77", "tweet_emotion"):
        pairs[name] = pair_by_label(read_rows(data / name / "train.jsonl"), rng)
    for rows in pairs.values():
        rng.shuffle(rows)
    return pairs


def pair_by_label(rows: Sequence[Mapping[str, Any]], rng: random.Random) -> Pairs:
    """Return disjoint pairs of texts that have the same label."""
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        texts[row["label"]].append(row["text"])
    for group in texts.values():
        rng.shuffle(group)
    return [pair for group in texts.values() for pair in zip(group[::2], group[1::2], strict=False)]


def write_pairs(path: Path, pairs: Mapping[str, Pairs], num_rows: int, seed: int) -> None:
    """Write the first pairs of each data set to one file, mixed."""
    rows = [pair for group in pairs.values() for pair in group[:num_rows]]
    random.Random(seed).shuffle(rows)
    lines = [json.dumps({"query": query, "pos": [positive]}, ensure_ascii=False) + "\n" for query, positive in rows]
    path.write_text("".join(lines), encoding="utf-8")


def train_sentence_transformers(args: argparse.Namespace, pairs: Path, seed: int, out: Path) -> float:
    """Train with sentence-transformers. Return the seconds of a step."""
    result, _ = run_script([
        str(BENCHMARKS / "finetune_sentence_transformers.py"), args.base, str(pairs), str(out), f"--steps={args.steps}",
        f"--batch-size={args.batch_size}", f"--learning-rate={args.learning_rate}", f"--warmup-steps={WARMUP_STEPS}",
        f"--max-length={MAX_LENGTH}", f"--seed={seed}",
    ])  # fmt: skip
    return result["seconds_per_step"]


def train_jaxembed(args: argparse.Namespace, pairs: Path, seed: int, steps: int, out: Path) -> float:
    """Train with jaxembed. Return the seconds of a step."""
    tree = {
        "run": {"dir": str(out)},
        "data": {"max_length": MAX_LENGTH, "sources": [{"path": str(pairs), "name": "pairs"}]},
        "model": make_model_section(args.base),
        "objectives": [{"name": "infonce", "temperature": 0.05}],
        "optim": {"learning_rate": args.learning_rate, "warmup_steps": WARMUP_STEPS, "schedule": "linear", "weight_decay": 0.01,
                  "clip": 1.0},
        "train": {"steps": steps, "batch_size": args.batch_size, "seed": seed, "log_every": 1, "checkpoint_every": steps},
        "eval": {"untrained": False},
        "mesh": {"data": 1},
    }  # fmt: skip
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    run_script(["-m", "jaxembed.train", str(config)])
    rows = [row for row in read_metrics(out) if "loss" in row]
    return statistics.mean(row["step_seconds"] for row in rows if not row["new_programs"])


def score(model: Path | str, args: argparse.Namespace) -> Scores:
    """Return the score of each task, in percent."""
    names = ["--tasks", *args.task_names] if args.task_names else []
    result, _ = run_script([str(BENCHMARKS / "score.py"), str(args.tasks), str(model), "--checkpoint=last", *names])
    return {task: 100 * values["score"] for task, values in result[str(model)].items()}


def store(path: Path, compute: Callable[[], Any]) -> Any:
    """Return the JSON value in a file. If the file is missing, compute the value and write it."""
    if not path.exists():
        path.write_text(json.dumps(compute()))
        print(f"{path.stem}: {path.read_text()}", file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def measure_step_times(args: argparse.Namespace, out: Path) -> dict[str, list[float]]:
    """Train both programs with each seed, in turns. Return the seconds of a step of each."""
    train = {
        "sentence-transformers": train_sentence_transformers,
        "jaxembed": lambda args, pairs, seed, model: train_jaxembed(args, pairs, seed, args.steps, model),
    }
    seconds: dict[str, list[float]] = {name: [] for name in train}
    for seed in range(args.seeds):
        pairs = out / f"pairs-{seed}.jsonl"
        write_pairs(pairs, read_pairs(args.data, seed), args.rows, seed)
        for name in list(train)[:: 1 if seed % 2 == 0 else -1]:
            model = out / f"{name}-{seed}"
            seconds[name].append(store(out / f"seconds-{model.name}.json", partial(train[name], args, pairs, seed, model)))
    return seconds


def format_row(name: str, scores: Sequence[Scores]) -> str:
    """Return one row of the table."""
    cells = [format_mean([score[task] for score in scores], 2) for task in scores[0]]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="sentence-transformers or decoder folder")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the data sets")
    parser.add_argument("tasks", metavar="TASKS.py", type=Path, help="Python file with a function tasks(names)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=400, help="pairs of each data set (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="(default: %(default)s)")
    parser.add_argument(
        "--tasks", dest="task_names", metavar="NAME", nargs="*", help="names of tasks (default: all of TASKS.py)"
    )
    parser.add_argument("--equal-time", action="store_true", help="also train jaxembed for the time of sentence-transformers")
    parser.add_argument("--out", type=Path, help="folder of the models (default: a temporary folder)")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="finetuned-"))
    out.mkdir(exist_ok=True)
    seconds = {name: statistics.mean(values) for name, values in measure_step_times(args, out).items()}
    names = list(seconds)
    if args.equal_time:
        names.append("jaxembed, equal time")
        steps = max(round(args.steps * seconds["sentence-transformers"] / seconds["jaxembed"]), 1)
        print(f"{steps} steps in the time of {args.steps}", file=sys.stderr, flush=True)
        for seed in range(args.seeds):
            model = out / f"{names[-1]}-{seed}"
            train = partial(train_jaxembed, args, out / f"pairs-{seed}.jsonl", seed, steps, model)
            store(out / f"seconds-{model.name}.json", train)
    scores = {"before": [store(out / "scores-before.json", lambda: score(args.base, args))]}
    for seed, name in itertools.product(range(args.seeds), names):
        model = out / f"{name}-{seed}"
        scores.setdefault(name, []).append(store(out / f"scores-{model.name}.json", partial(score, model, args)))
    print("| | " + " | ".join(scores["before"][0]) + " |\n|" + "---|" * (len(scores["before"][0]) + 1))
    for name, rows in scores.items():
        print(format_row(name, rows))
    print(json.dumps({"seconds": seconds, "scores": scores}))


if __name__ == "__main__":
    main()
