"""Train one small model with random weights on STS-B with each graded objective, and with InfoNCE on its positives alone.

Usage: python benchmarks/graded.py STSB [--steps N] [--seeds N]

STSB is a folder with a folder for each language (en, zh, fr, pl, de), each with train.jsonl and test.jsonl: rows of sentence1,
sentence2, and score from 0 to 5. Training is on English alone. Each row of the table has Spearman's correlation on the test
sets, as mean and standard deviation over the seeds. The last line is JSON with all scores.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

from jaxembed import Embedder, cli
from jaxembed.config import Config, EvalSetConfig, parse_config
from jaxembed.evaluation.heldout import open_held_out_sets, score_sets
from jaxembed.files import cache_dir
from jaxembed.runs.train import train

LANGUAGES = ("en", "zh", "fr", "pl", "de")
ALL_DIRECTIONS = ["query_document", "query_query", "document_query", "document_document"]
IN_BATCH = {"name": "infonce", "directions": ALL_DIRECTIONS, "per_direction": True}
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
        "model": {"base": base, "attention": "bidirectional", "pooling": {"kind": "mean"}},
        "data": {"max_length": 32, "sources": [{"path": str(args.stsb / "en" / "train.jsonl"), "name": "stsb"}]},
        "objectives": objectives,
        "optim": {"learning_rate": args.learning_rate, "warmup_steps": 10, "schedule": "cosine"},
        "train": {"steps": args.steps, "batch_size": args.batch_size, "seed": seed, "log_every": 50, "eval_every": args.steps,
                  "checkpoint_every": args.steps},
        "eval": {"untrained": False},
        "mesh": {"data": 1},
    }  # fmt: skip
    return parse_config(tree, "benchmark")


def write_base(out: Path, args: argparse.Namespace) -> str:
    """Write a small model with random weights and a tokenizer of the training texts: a run of a step that changes nothing."""
    config = make_config("preset:tiny", OBJECTIVES["cosine regression"], 0, out, args)
    optim, steps = config.optim.replace(learning_rate=1e-12), config.train.replace(steps=1)
    tree = config.model_dump(mode="json", exclude={"stages"}) | {"optim": optim.model_dump(), "train": steps.model_dump()}
    train(parse_config(tree, "base"))
    return str(out)


def score_model(model: str, stsb: Path) -> dict[str, float]:
    """Return Spearman's correlation on the test set of each language."""
    sets = [EvalSetConfig(name=lang, kind="sts", path=str(stsb / lang / "test.jsonl")) for lang in LANGUAGES]
    return score_sets(open_held_out_sets(sets, cache_dir()), Embedder.load(model).encode)


def format_row(name: str, scores: list[dict[str, float]]) -> str:
    """Return one row of the table: mean and standard deviation over the seeds for each language."""
    cells = []
    for language in LANGUAGES:
        values = [score[f"{language}/spearman"] for score in scores]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stsb", metavar="STSB", type=Path, help="folder of the STS benchmark by language")
    parser.add_argument("--steps", type=int, default=60, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    print(f"| trained with | {' | '.join(LANGUAGES)} |\n|---{'|---' * len(LANGUAGES)}|", flush=True)
    base = write_base(folder / "base", args)
    scores = {"untrained": [score_model(base, args.stsb)]}
    print(format_row("untrained", scores["untrained"]), flush=True)
    for i, (name, objectives) in enumerate(OBJECTIVES.items()):
        configs = [make_config(base, objectives, seed, folder / f"{i}-{seed}", args) for seed in range(args.seeds)]
        scores[name] = [score_model(train(config)["run_dir"], args.stsb) for config in configs]
        print(format_row(name, scores[name]), flush=True)
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
