"""Train one model on STS-B with each graded objective, with exits and quantization, and with InfoNCE on its positives only.

Usage: python benchmarks/graded.py STSB OUT.jsonl [--base FOLDER] [--steps N] [--seeds N]

STSB is a folder with a folder for each language (en, zh, fr, pl, de), each with train.jsonl and test.jsonl: rows of sentence1,
sentence2, and score from 0 to 5. Training uses only English. The model is FOLDER, or a small one with random weights.
Each finished run is one line of OUT.jsonl, and later commands with the same settings do not repeat it. Prints two tables of
Spearman's correlation on the test sets, as mean and standard deviation over the seeds: by language, and in English of the first
layers and of quantized vectors.
"""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
from finished_runs import FinishedRuns, Scores
from jsonl_rows import read_rows
from table_cells import format_mean
from vector_versions import QUANTIZED, WHOLE, list_exits, name_exit, score_versions

from jaxembed import Embedder, cli
from jaxembed.config import Config, EvalSetConfig, parse_config
from jaxembed.config.objectives import Direction
from jaxembed.config.stage import merge_trees
from jaxembed.evaluation.heldout import HeldOutSet, open_held_out_sets, score_set
from jaxembed.files import cache_dir
from jaxembed.runs.train import train
from jaxembed.search.precision import RANGES_FILE, merge_ranges

LANGUAGES = ("en", "zh", "fr", "pl", "de")
RANGE_PAIRS = 250  # pairs of the training file whose vectors give the ranges of int8
IN_BATCH = {"name": "infonce", "directions": list(typing.get_args(Direction)), "per_direction": True}
COSENT = {"objectives": [{"name": "cosent"}]}
UNTRAINED = "untrained"


def list_rows(exits: list[int], ranges: Path) -> dict[str, dict[str, Any]]:
    """Return the changes to the config by row.

    Args:
        exits: Exits of the row that has fixed ones.
        ranges: File of the ranges of int8.
    """
    return {
        "InfoNCE on scores of 4 and more": {"objectives": [{"name": "infonce"}]},
        "CoSENT": COSENT,
        "AnglE alone": {"objectives": [{"name": "angle"}]},
        "cosine regression": {"objectives": [{"name": "cosine_regression"}]},
        "UAE (cosine 1, in-batch 1, angle 1)": {"objectives": [{"name": "cosent"}, IN_BATCH, {"name": "angle"}]},
        "CoSENT, fixed exits": {**COSENT, "exits": {"layers": exits}},
        "CoSENT, 2DMSE": {**COSENT, "matryoshka": {"dims": [128]}, "exits": {"random": 1, "align": 0.3}},
        "CoSENT, int8 and binary": {**COSENT, "quantization": {"precisions": QUANTIZED, "ranges": str(ranges)}},
    }


def make_config(base: str, changes: dict[str, Any], seed: int, out: Path, args: argparse.Namespace) -> Config:
    """Return the config of a run without held-out sets."""
    tree: dict[str, Any] = {
        "run": {"dir": str(out)},
        "model": {"base": base, "attention": "bidirectional", "pooling": {"kind": "mean"}, "unroll": False,
                  "dtype": args.dtype},
        "data": {"max_length": 128, "sources": [{"path": str(args.stsb / "en" / "train.jsonl"), "name": "stsb"}]},
        "optim": {"learning_rate": args.learning_rate, "warmup_steps": args.steps // 5, "schedule": "cosine"},
        "train": {"steps": args.steps, "batch_size": args.batch_size, "seed": seed, "log_every": 50, "eval_every": args.steps,
                  "checkpoint_every": args.steps},
        "eval": {"untrained": False},
        "mesh": {"data": 1},
    }  # fmt: skip
    return parse_config(merge_trees(tree, changes), "benchmark")


def write_base(out: Path, args: argparse.Namespace) -> str:
    """Train a small model with random weights for one step, at a learning rate that changes nothing. Return its run directory.

    The run has the tokenizer of the training texts.
    """
    options = argparse.Namespace(**{**vars(args), "steps": 1, "learning_rate": 1e-12})
    train(make_config("preset:tiny", {"objectives": [{"name": "cosine_regression"}]}, 0, out, options))
    return str(out)


def open_test_sets(folder: Path, args: argparse.Namespace) -> list[HeldOutSet]:
    """Write evenly spaced pairs of each test set to `folder`, and open them."""
    sections = []
    for language in LANGUAGES:
        lines = (args.stsb / language / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        rows = np.unique(np.linspace(0, len(lines) - 1, args.test_pairs or len(lines)).astype(int))
        path = folder / f"{language}.jsonl"
        path.write_text("".join(lines[row] for row in rows), encoding="utf-8")
        sections.append(EvalSetConfig(name=language, kind="sts", path=str(path)))
    return open_held_out_sets(sections, cache_dir())


def list_range_texts(args: argparse.Namespace) -> list[str]:
    """Return the first training sentences, whose vectors give the ranges of int8."""
    rows = read_rows(args.stsb / "en" / "train.jsonl")[:RANGE_PAIRS]
    return [row[side] for row in rows for side in ("sentence1", "sentence2")]


def score_model(model: str, sets: list[HeldOutSet], args: argparse.Namespace) -> Scores:
    """Return Spearman's correlation by language, and in English by exit and precision."""
    embedder, english = Embedder.load(model), sets[0]
    scores = {held_out.config.name: score_set(held_out, embedder.encode).items.score for held_out in sets[1:]}
    scores |= score_versions(embedder, english, list_range_texts(args))
    return {english.config.name: scores.pop(WHOLE), **scores}


def print_tables(names: list[str], exits: list[int], finished: FinishedRuns) -> None:
    """Print the tables of finished runs."""
    for columns in (LANGUAGES, (LANGUAGES[0], *map(name_exit, exits), *QUANTIZED)):
        print(f"| trained with | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
        for name in names:
            if runs := finished.read(row=name):
                cells = [format_mean([run["scores"][column] for run in runs], 3) for column in columns]
                print(f"| {name} | {' | '.join(cells)} |")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stsb", metavar="STSB", type=Path, help="folder of the STS benchmark by language")
    parser.add_argument("out", metavar="OUT.jsonl", type=Path, help="file of the finished runs")
    parser.add_argument("--base", metavar="FOLDER", help="model to train (default: a small one with random weights)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="train only these rows")
    parser.add_argument("--steps", type=int, default=60, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--test-pairs", type=int, metavar="N", help="pairs of each test set to score (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    sets = open_test_sets(folder, args)
    base = args.base or write_base(folder / "base", args)
    ignored = ("out", "only", "seeds")
    finished = FinishedRuns(args.out, {name: value for name, value in vars(args).items() if name not in ignored})
    finished.run_missing(lambda _: score_model(base, sets, args), row=UNTRAINED, seed=0)
    embedder, ranges = Embedder.load(base), folder / RANGES_FILE
    np.save(ranges, merge_ranges(None, embedder.encode(list_range_texts(args))))
    exits = list_exits(embedder)
    rows = list_rows(exits, ranges)
    if unknown := set(args.only or []) - rows.keys():
        parser.error(f"--only: no such row {unknown.pop()!r} (expected: {', '.join(rows)})")

    def measure(changes: dict[str, Any], seed: int, run: Path) -> Scores:
        train(make_config(base, changes, seed, run, args))
        return score_model(str(run), sets, args)

    for name in args.only or rows:
        for seed in range(args.seeds):
            finished.run_missing(functools.partial(measure, rows[name], seed), row=name, seed=seed)
    print_tables([UNTRAINED, *rows], exits, finished)


if __name__ == "__main__":
    main()
