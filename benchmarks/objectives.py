#!/usr/bin/env python3
"""Every objective, and the papers' ablations that fit a small model, on real data: held-out scores with their spread.

    python benchmarks/objectives.py BASE PAIRS.jsonl HELDOUT LABELS.jsonl TEACHER [--steps 60] [--seeds 3] [--only NAME ...]

BASE is a small pretrained decoder folder, PAIRS the main JSONL format, HELDOUT a BEIR folder of the same kind, LABELS lines
of text and label, TEACHER any embedding model, better than BASE. Three of the positives that TEACHER ranks 50 to 100 for a
query (KaLM's window) become the query's hard negatives, with TEACHER's scores; it is the guide and gives vectors to match, too.
Then each row of the tables is trained from the base, once a seed. Scores are nDCG@10 of HELDOUT, mean and standard deviation
over seeds. Prints Markdown tables as they grow and, on the last line, one JSON object.
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
from pathlib import Path
from typing import Any

import yaml

from jaxembed import Embedder, cli, config
from jaxembed.evaluation.heldout import open_sets
from jaxembed.runs.train import train

DIRECTIONS = ["query_document", "query_query", "document_query", "document_document"]


def objective(**keys: Any) -> dict[str, Any]:
    return {"objectives": [{"name": "infonce", "temperature": 0.05, **keys}]}


def objectives(teacher: str) -> dict[str, dict[str, Any]]:
    """A row's name -> what it changes."""
    beside = {"name": "infonce", "temperature": 0.05}
    return {
        "InfoNCE": objective(),
        "in-batch negatives alone": objective(negatives="in_batch"),
        "hard negatives alone": objective(negatives="hard"),
        "GTE's four directions": objective(directions=DIRECTIONS),
        "same tower (SamToNe)": objective(directions=DIRECTIONS[:2]),
        "symmetric": objective(directions=[DIRECTIONS[0], DIRECTIONS[2]], per_direction=True),
        "margin 0.1 (Qwen3)": objective(margin=0.1),
        "guide (GISTEmbed)": objective(guide=teacher),
        "focal 0.5 (KaLM-V2)": objective(focal=0.5),
        "hardness 5 (EmbeddingGemma)": objective(hardness=5.0),
        "4 mixed negatives (KaLM-V2)": objective(mixed_negatives=4),
        "learned temperature": objective(learn_temperature=True),
        "InfoNCE + spread-out": {"objectives": [beside, {"name": "spread_out"}]},
        "KL to a teacher": {"objectives": [{"name": "kl_distillation", "teacher_temperature": 0.05, "hard_labels": 0.2}]},
        "MarginMSE": {"objectives": [{"name": "margin_mse", "weight": 10.0}]},
        "embedding matching": {"objectives": [{"name": "embedding_matching", "teacher": teacher}]},
        "InfoNCE, Matryoshka 128 and 64": {"matryoshka": {"dims": [128, 64]}},
        "InfoNCE, gradcache.rows 4": {"gradcache": {"rows": 4}},
    }


def ablations(pairs: str, labels: str, steps: int) -> dict[str, dict[str, Any]]:
    instruction = "Given a headline, retrieve its news text"
    news = {"path": pairs, "name": "news"}
    classes = {"path": labels, "name": "classes", "format": "labels", "label_documents": "examples"}
    blend = {"data": {"sources": [news, classes]}}
    hard, halves = objective(negatives="hard"), {"train": {"steps": steps // 2}}
    return {
        "causal": {"model": {"attention": "causal"}},
        "bidirectional": {"model": {"attention": "bidirectional"}},
        "without instructions": {},
        "with instructions": {"data": {"sources": [news | {"instructions": [instruction]}]}},
        "labels beside pairs, without in-batch negatives": blend,
        "labels beside pairs, with them": {"data": {"sources": [news, classes | {"in_batch_negatives": True}]}},
        "one stage: pairs and labels, hard negatives": blend | hard,
        "two stages: pairs in-batch, then both, hard": {"stages": [halves, halves | blend | hard]},
        "two stages, reversed": {"stages": [halves | blend | hard, halves]},
        "plain, cut to 64": {"dim": 64},
        "Matryoshka 64, cut to 64": {"matryoshka": {"dims": [64]}, "dim": 64},
    }


@dataclasses.dataclass(frozen=True)
class Bench:
    """Trains rows of a table from one base, each run into a folder of its own."""

    base: str
    folder: Path
    batch_size: int
    learning_rate: float

    def run(self, name: str, changes: dict[str, Any], seed: int, pairs: str, steps: int) -> str:
        """Trains one row once; returns its run directory."""
        train_ = {"batch_size": self.batch_size, "seed": seed, "log_every": 10, "checkpoint_every": 10**6}
        tree: dict[str, Any] = {
            "model": {"base": self.base, "attention": "bidirectional", "pooling": {"kind": "mean"}, "unroll": False},
            "data": {"max_length": 128, "hard_negatives": 3, "sources": [{"path": pairs, "name": "news"}]},
            "objectives": [{"name": "infonce", "temperature": 0.05}],
            "optim": {"learning_rate": self.learning_rate, "warmup_steps": 5},
            "train": train_ if "stages" in changes else {**train_, "steps": steps},
            "mesh": {"data": 1},
        }
        for key, value in changes.items():
            if key != "dim":
                tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
        out = self.folder / f"{name}-{seed}".replace(" ", "_").replace(",", "").replace(":", "")
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tree | {"run": {"dir": str(out)}}))
        train(config.load_config(path))
        return str(out)


def scored(model: str, heldout: Path, dim: int | None = None, instruction: str = "") -> float:
    embedder = Embedder.load(model)
    tree = config.EvalSetConfig(name="heldout", kind="retrieval", path=str(heldout), instruction=instruction)
    [opened] = open_sets([tree], config.PythonPackagesConfig(), heldout)
    return opened.score(lambda texts, of: embedder.encode(texts, of, dim))["ndcg_at_10"]


def mined(miner: str, pairs: Path, out: Path, *options: str) -> str:
    """The file of pairs with 3 mined negatives each and the miner's scores, made unless it is there."""
    if not out.exists():
        command = [sys.executable, "-m", "jaxembed.mine", miner, str(pairs), str(out), "--negatives=3", *options]
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout, file=sys.stderr)
    return str(out)


def opened(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Bench]:
    """The command line, with the options that tables of trained rows share, and what trains the rows."""
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--only", nargs="*", help="rows whose name holds one of these")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    return args, Bench(args.base, folder, args.batch_size, args.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("teacher")
    args, bench = opened(parser)
    untrained = scored(args.base, args.heldout)
    pairs = mined(args.teacher, args.pairs, bench.folder / "mined.jsonl", "--rule=window", "--window", "50", "100")
    print(f"Untrained {untrained:.4f}.\n", flush=True)
    found: dict[str, list[float]] = {}
    for table in (objectives(args.teacher), ablations(pairs, str(args.labels), args.steps)):
        print("| trained with | nDCG@10 | spread | above untrained, in spreads |\n|---|---|---|---|", flush=True)
        for name, changes in table.items():
            if args.only and not any(part in name for part in args.only):
                continue
            sources = changes.get("data", {}).get("sources", [{}])
            instruction = next(iter(sources[0].get("instructions", [])), "")
            if "data" in changes:
                changes = changes | {"data": {"max_length": 128, "hard_negatives": 3, **changes["data"]}}
            runs = [bench.run(name, changes, seed, pairs, args.steps) for seed in range(args.seeds)]
            scores = [scored(run, args.heldout, changes.get("dim"), instruction) for run in runs]
            spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
            found[name] = scores
            above = (statistics.mean(scores) - untrained) / max(spread, 1e-9)
            print(f"| {name} | {statistics.mean(scores):.4f} | {spread:.4f} | {above:.0f} |", flush=True)
        print()
    print(json.dumps({"untrained": untrained, "scores": found}))


if __name__ == "__main__":
    main()
