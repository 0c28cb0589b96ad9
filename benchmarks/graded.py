"""Train one model on STS-B with each graded objective, and with InfoNCE on its positives only.

Usage: python benchmarks/graded.py STSB [--base FOLDER] [--steps N] [--seeds N]

STSB is a folder with a folder for each language (en, zh, fr, pl, de), each with train.jsonl and test.jsonl: rows of sentence1,
sentence2, and score from 0 to 5. Training uses only English. The model is FOLDER, or a small one with random weights.
Each run prints a line of JSON. The table at the end has Spearman's correlation on the test sets, as mean and standard deviation
over the seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import typing
from pathlib import Path
from typing import Any

from table_cells import format_mean

from jaxembed import Embedder, cli
from jaxembed.config import Config, EvalSetConfig, parse_config
from jaxembed.config.objectives import Direction
from jaxembed.evaluation.heldout import open_held_out_sets, score_sets
from jaxembed.files import cache_dir
from jaxembed.runs.train import train

LANGUAGES = ("en", "zh", "fr", "pl", "de")
IN_BATCH = {"name": "infonce", "directions": list(typing.get_args(Direction)), "per_direction": True}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "InfoNCE on scores of 4 and more": [{"name": "infonce"}],
    "CoSENT": [{"name": "cosent"}],
    "AnglE alone": [{"name": "angle"}],
    "cosine regression": [{"name": "cosine_regression"}],
    "UAE (cosine 1, in-batch 1, angle 1)": [{"name": "cosent"}, IN_BATCH, {"name": "angle"}],
}


def make_config(base: str, objectives: list[dict[str, Any]], seed: int, out: Path, args: argparse.Namespace) -> Config:
    """Return the config of a run without held-out sets."""
    tree: dict[str, Any] = {
        "run": {"dir": str(out)},
        "model": {"base": base, "attention": "bidirectional", "pooling": {"kind": "mean"}, "unroll": False},
        "data": {"max_length": 128, "sources": [{"path": str(args.stsb / "en" / "train.jsonl"), "name": "stsb"}]},
        "objectives": objectives,
        "optim": {"learning_rate": args.learning_rate, "warmup_steps": 10, "schedule": "cosine"},
        "train": {"steps": args.steps, "batch_size": args.batch_size, "seed": seed, "log_every": 50, "eval_every": args.steps,
                  "checkpoint_every": args.steps},
        "eval": {"untrained": False},
        "mesh": {"data": 1},
    }  # fmt: skip
    return parse_config(tree, "benchmark")


def write_base(out: Path, args: argparse.Namespace) -> str:
    """Train a small model with random weights for one step, at a learning rate that changes nothing. Return its run directory.

    The run has the tokenizer of the training texts.
    """
    options = argparse.Namespace(**{**vars(args), "steps": 1, "learning_rate": 1e-12})
    train(make_config("preset:tiny", OBJECTIVES["cosine regression"], 0, out, options))
    return str(out)


def write_test_sets(folder: Path, args: argparse.Namespace) -> None:
    """Write the first pairs of each test set."""
    for language in LANGUAGES:
        lines = (args.stsb / language / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{language}.jsonl").write_text("".join(lines[: args.test_pairs]), encoding="utf-8")


def score_model(model: str, folder: Path) -> dict[str, float]:
    """Return Spearman's correlation on the test set of each language."""
    sets = [EvalSetConfig(name=lang, kind="sts", path=str(folder / f"{lang}.jsonl")) for lang in LANGUAGES]
    return score_sets(open_held_out_sets(sets, cache_dir()), Embedder.load(model).encode)


def format_row(name: str, scores: list[dict[str, float]]) -> str:
    """Return one row of the table: mean and standard deviation over the seeds for each language."""
    cells = [format_mean([score[f"{language}/spearman"] for score in scores], 3) for language in LANGUAGES]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stsb", metavar="STSB", type=Path, help="folder of the STS benchmark by language")
    parser.add_argument("--base", metavar="FOLDER", help="model to train (default: a small one with random weights)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--test-pairs", type=int, metavar="N", help="pairs of each test set to score (default: all)")
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    write_test_sets(folder, args)
    base = args.base or write_base(folder / "base", args)
    scores: dict[str, list[dict[str, float]]] = {"untrained": [score_model(base, folder)]}
    scores |= {name: [] for name in OBJECTIVES}
    for seed in range(args.seeds):
        for name, objectives in OBJECTIVES.items():
            run_dir = folder / "run"
            train(make_config(base, objectives, seed, run_dir, args))
            scores[name].append(score_model(str(run_dir), folder))
            print(json.dumps({"seed": seed, "objective": name, **scores[name][-1]}), flush=True)
            shutil.rmtree(run_dir)
    print(f"| trained with | {' | '.join(LANGUAGES)} |\n|---{'|---' * len(LANGUAGES)}|")
    for name, rows in scores.items():
        print(format_row(name, rows))
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
