"""Train one small model on noisy data and on its curated rows, for the same number of steps.

Usage: python benchmarks/curation_effect.py MODEL DATA [--base BASE] [--learning-rate RATE] [--rows N] [--steps N] [--seeds N]

MODEL finds wrong positives, such as all-MiniLM-L6-v2. BASE is trained: random weights (preset:tiny), or a pretrained model,
which is also scored without training. DATA is a folder with ag_news/pairs_train.jsonl, ag_news/retrieval
(BEIR) and stsb/en/{train,test}.jsonl. The noisy data are pairs of AG News (title -> text) and pairs of STS-B with a score of 4
or more. Of each source, 40% of the rows have the positive of another row, and a fifth of all rows occur twice. The table has
nDCG@10 on the BEIR folder and Spearman's correlation on STS-B, as mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonl_rows import read_rows
from table_cells import format_mean

from jaxembed import Embedder, cli
from jaxembed.config import Config, EvalSetConfig, parse_config
from jaxembed.config.curation import CurateConfig
from jaxembed.curate import make_context
from jaxembed.curation.engine import curate
from jaxembed.data.jsonl import write_jsonl
from jaxembed.evaluation.heldout import open_held_out_sets, score_sets
from jaxembed.files import cache_dir
from jaxembed.runs.train import train

WRONG_SHARE, REPEATED_SHARE = 0.4, 0.2  # of the rows of a source
METRICS = ("news/ndcg_at_10", "sentences/spearman")
Pairs = list[tuple[str, str]]


def read_clean_pairs(data: Path, num_rows: int) -> dict[str, Pairs]:
    """Return the first pairs of each source, by name."""
    news = [(row["query"], row["pos"][0]) for row in read_rows(data / "ag_news" / "pairs_train.jsonl")]
    rows = read_rows(data / "stsb" / "en" / "train.jsonl")
    sentences = [(row["sentence1"], row["sentence2"]) for row in rows if row["score"] >= 4]
    return {"news": news[:num_rows], "sentences": sentences[:num_rows]}


def add_noise(pairs: Pairs, rng: np.random.Generator) -> Pairs:
    """Give some rows the positive of another one, and repeat some rows."""
    wrong = rng.choice(len(pairs), int(WRONG_SHARE * len(pairs)), replace=False)
    noisy = list(pairs)
    for i, j in zip(wrong.tolist(), np.roll(wrong, 1).tolist(), strict=True):
        noisy[i] = (pairs[i][0], pairs[j][1])
    return noisy + [noisy[i] for i in rng.choice(len(noisy), int(REPEATED_SHARE * len(noisy)), replace=False).tolist()]


def write_pairs(folder: Path, sources: dict[str, Pairs]) -> dict[str, Path]:
    """Write the pairs of each source to a file of a new folder. Return the files by source."""
    folder.mkdir()
    for name, pairs in sources.items():
        write_jsonl(folder / f"{name}.jsonl", [{"query": query, "pos": [positive]} for query, positive in pairs])
    return {name: folder / f"{name}.jsonl" for name in sources}


def curate_files(files: dict[str, Path], model: str, out: Path) -> dict[str, Path]:
    """Remove copies, and rows whose positive the model does not find. Return the files of the remaining rows by source."""
    steps = [
        {"name": "duplicates"},
        {"name": "mine", "model": model, "negatives": 0, "consistency_top_k": 2},
    ]
    sources = [{"path": str(path), "name": name} for name, path in files.items()]
    result = curate(
        CurateConfig.model_validate({"out": str(out), "sources": sources, "steps": steps}),
        make_context(cache_dir()),
        "benchmark",
    )
    logging.getLogger("jaxembed").warning("curated: %s", json.dumps(result["rows"]))
    return {name: out / f"{name}.jsonl" for name in files}


def make_config(files: dict[str, Path], seed: int, out: Path, args: argparse.Namespace) -> Config:
    """Return the config of a run without held-out sets."""
    tree: dict[str, Any] = {
        "run": {"dir": str(out)},
        "model": {"base": args.base, "attention": "bidirectional", "pooling": {"kind": "mean"}},
        "data": {"max_length": 64, "hard_negatives": 0,
                 "sources": [{"path": str(path), "name": name} for name, path in files.items()]},
        "objectives": [{"name": "infonce", "temperature": 0.05}],
        "optim": {"learning_rate": args.learning_rate, "warmup_steps": 10, "schedule": "cosine"},
        "train": {"steps": args.steps, "batch_size": 64, "seed": seed, "log_every": 50, "eval_every": args.steps,
                  "checkpoint_every": args.steps},
        "eval": {"untrained": False},
        "mesh": {"data": 1},
    }  # fmt: skip
    return parse_config(tree, "benchmark")


def score_model(model: str, data: Path) -> dict[str, float]:
    """Return the scores on both held-out sets, by the names in `METRICS`."""
    sets = [
        EvalSetConfig(name="news", path=str(data / "ag_news" / "retrieval")),
        EvalSetConfig(name="sentences", kind="sts", path=str(data / "stsb" / "en" / "test.jsonl")),
    ]
    return score_sets(open_held_out_sets(sets, cache_dir()), Embedder.load(model).encode)


def print_row(name: str, num_rows: int, scores: Sequence[Mapping[str, float]]) -> None:
    """Print the row of the table for some data, given the scores of each run."""
    cells = [format_mean([score[metric] for score in scores], 4) for metric in METRICS]
    print(f"| {name} | {num_rows:,} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="sentence-transformers model")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the data sets")
    parser.add_argument("--base", default="preset:tiny", help="model to train (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="clean rows of each source (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    clean, rng = read_clean_pairs(args.data, args.rows), np.random.default_rng(0)
    noisy = write_pairs(folder / "noisy", {name: add_noise(pairs, rng) for name, pairs in clean.items()})
    data = {"noisy": noisy, "curated": curate_files(noisy, args.model, folder / "curated")}
    data["clean"] = write_pairs(folder / "clean", clean)
    print("| data | rows | AG News, nDCG@10 | STS-B, Spearman |\n|---|---|---|---|", flush=True)
    if not args.base.startswith("preset:"):
        print_row("none: the base", 0, [score_model(args.base, args.data)])
    for name, files in data.items():
        runs = [train(make_config(files, seed, folder / f"{name}-{seed}", args)) for seed in range(args.seeds)]
        print_row(
            name, sum(len(read_rows(path)) for path in files.values()), [score_model(run["run_dir"], args.data) for run in runs]
        )


if __name__ == "__main__":
    main()
