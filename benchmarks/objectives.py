#!/usr/bin/env python3
"""Measure the held-out score of each objective, with its spread over seeds. benchmarks/ablations.py has the papers' ablations.

    python benchmarks/objectives.py BASE PAIRS.jsonl HELDOUT TEACHER [--steps 60] [--seeds 3] [--only NAME ...]

BASE is a small pretrained decoder folder, PAIRS a JSONL file of pairs, HELDOUT a BEIR folder of the same kind, TEACHER any
embedding model that is better than BASE. TEACHER mines 3 hard negatives per query, at ranks 50 to 100 (KaLM's window), with
scores. It is also the guide and the teacher of the objectives that need one. Then each row of the table is trained from BASE,
once per seed. Scores are nDCG@10 on HELDOUT.

Prints the score of BASE, a Markdown table row by row (mean, standard deviation, and gain over BASE in standard deviations)
and, on the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

import yaml

from jaxembed import Embedder, cli, config
from jaxembed.config.objectives import Direction
from jaxembed.config.stage import merge_trees
from jaxembed.evaluation.heldout import open_held_out_sets, score_set
from jaxembed.runs.train import train

ALL_DIRECTIONS = list(typing.get_args(Direction))


def make_infonce(**keys: Any) -> dict[str, Any]:
    """Return the change of a config to InfoNCE with these keys."""
    return {"objectives": [{"name": "infonce", "temperature": 0.05, **keys}]}


def list_objectives(teacher: str) -> dict[str, dict[str, Any]]:
    """Return the rows of the table: the changes to the config, by name."""
    infonce = {"name": "infonce", "temperature": 0.05}
    return {
        "InfoNCE": make_infonce(),
        "in-batch negatives alone": make_infonce(negatives="in_batch"),
        "hard negatives alone": make_infonce(negatives="hard"),
        "GTE's four directions": make_infonce(directions=ALL_DIRECTIONS),
        "same tower (SamToNe)": make_infonce(directions=["query_document", "query_query"]),
        "symmetric": make_infonce(directions=["query_document", "document_query"], per_direction=True),
        "margin 0.1 (Qwen3)": make_infonce(margin=0.1),
        "guide (GISTEmbed)": make_infonce(guide=teacher),
        "focal 0.5 (KaLM-V2)": make_infonce(focal=0.5),
        "hardness 5 (EmbeddingGemma)": make_infonce(hardness=5.0),
        "4 mixed negatives (KaLM-V2)": make_infonce(mixed_negatives=4),
        "learned temperature": make_infonce(learn_temperature=True),
        "InfoNCE + spread-out": {"objectives": [infonce, {"name": "spread_out"}]},
        "KL to a teacher": {"objectives": [{"name": "kl_distillation", "teacher_temperature": 0.05, "hard_labels": 0.2}]},
        "MarginMSE": {"objectives": [{"name": "margin_mse", "weight": 10.0}]},
        "embedding matching": {"objectives": [{"name": "embedding_matching", "teacher": teacher}]},
        "InfoNCE, Matryoshka 128 and 64": {"matryoshka": {"dims": [128, 64]}},
        "InfoNCE, gradcache.rows 4": {"gradcache": {"rows": 4}},
    }


@dataclasses.dataclass(frozen=True)
class RowTrainer:
    """Trains the rows of a table from one base, each in its own run directory.

    Attributes:
        base: Folder of the base model.
        folder: Folder of the run directories.
        batch_size: Queries per step.
        learning_rate: Peak learning rate.
    """

    base: str
    folder: Path
    batch_size: int
    learning_rate: float

    def train_row(self, name: str, changes: dict[str, Any], seed: int, pairs: str, steps: int) -> str:
        """Train one row with one seed.

        Args:
            name: Name of the row.
            changes: Its changes to the config.
            seed: The seed.
            pairs: JSONL file of pairs. `changes` may replace it.
            steps: Training steps.

        Returns:
            The run directory.
        """
        train_keys = {"batch_size": self.batch_size, "seed": seed, "log_every": 10, "checkpoint_every": 10**6}
        tree: dict[str, Any] = {
            "model": {"base": self.base, "attention": "bidirectional", "pooling": {"kind": "mean"}, "unroll": False},
            "data": {"max_length": 128, "hard_negatives": 3, "sources": [{"path": pairs, "name": "news"}]},
            "objectives": [{"name": "infonce", "temperature": 0.05}],
            "optim": {"learning_rate": self.learning_rate, "warmup_steps": 5},
            "train": {**train_keys, "steps": steps},
            "mesh": {"data": 1},
        }
        out = self.folder / f"{name}-{seed}".replace(" ", "_").replace(",", "").replace(":", "")
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(merge_trees(tree, {**changes, "run": {"dir": str(out)}})))
        train(config.load_config(path))
        return str(out)


def score_model(model: str, heldout: Path) -> float:
    """Return the nDCG@10 of a model on a BEIR folder."""
    embedder = Embedder.load(model)
    [held_out] = open_held_out_sets([config.EvalSetConfig(name="heldout", kind="retrieval", path=str(heldout))], heldout)
    return score_set(held_out, embedder.encode).scores["ndcg_at_10"]


def mine_pairs(miner: str, pairs: Path, out: Path, *options: str) -> str:
    """Mine 3 negatives per pair with the miner's scores, unless `out` exists, and return the path of `out`."""
    if not out.exists():
        command = [sys.executable, "-m", "jaxembed.mine", miner, str(pairs), str(out), "--negatives=3", *options]
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout, file=sys.stderr)
    return str(out)


def parse_and_set_up(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, RowTrainer]:
    """Add the options that all tables of trained rows share, parse the command line, and return arguments and trainer."""
    parser.add_argument("--steps", type=int, default=60, help="training steps per row (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="queries per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="train only rows whose name contains one of these texts")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary folder)")
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    return args, RowTrainer(args.base, folder, args.batch_size, args.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="small pretrained decoder folder")
    parser.add_argument("pairs", metavar="PAIRS.jsonl", type=Path, help="JSONL file of pairs")
    parser.add_argument("heldout", metavar="HELDOUT", type=Path, help="BEIR folder to score")
    parser.add_argument("teacher", metavar="TEACHER", help="embedding model that mines, guides and teaches")
    args, trainer = parse_and_set_up(parser)
    untrained = score_model(args.base, args.heldout)
    pairs = mine_pairs(args.teacher, args.pairs, trainer.folder / "mined.jsonl", "--rule=window", "--window", "50", "100")
    print(f"Untrained {untrained:.4f}.\n", flush=True)
    all_scores: dict[str, list[float]] = {}
    print("| trained with | nDCG@10 | standard deviation | gain over untrained, in standard deviations |\n|---|---|---|---|")
    for name, changes in list_objectives(args.teacher).items():
        if args.only and not any(part in name for part in args.only):
            continue
        runs = [trainer.train_row(name, changes, seed, pairs, args.steps) for seed in range(args.seeds)]
        scores = [score_model(run, args.heldout) for run in runs]
        deviation = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        all_scores[name] = scores
        gain = (statistics.mean(scores) - untrained) / max(deviation, 1e-9)
        print(f"| {name} | {statistics.mean(scores):.4f} | {deviation:.4f} | {gain:.0f} |", flush=True)
    print(json.dumps({"untrained": untrained, "scores": all_scores}))


if __name__ == "__main__":
    main()
