#!/usr/bin/env python3
"""jaxembed beside sentence-transformers on the same base, data, batch size, steps and learning rate, in float32.

    python benchmarks/vs_sentence_transformers.py BASE DATA.jsonl HELDOUT [--steps 20] [--seeds 3] [--out DIR]

BASE is a decoder folder, DATA the main JSONL format (one positive a line), HELDOUT a BEIR folder that is encoded and
scored. For every seed both sides train one after the other, each in its own process with every core, the side that begins
changing from seed to seed, and then encode by turns, five times each. Settings are those of
benchmarks/finetune_sentence_transformers.py and configs/ag_news.yaml: causal, mean pooling, no prompts, InfoNCE at
temperature 0.05 over in-batch negatives, AdamW.

Tokens are useful ones, padding left out; tokens a second are those of all steps that compile nothing over their time, since
sentence-transformers takes for a batch what its longest text takes, twice as long for one as for another, and a median leaves
the long ones out; memory is that of the process at its peak.
Prints a Markdown table and, on the last line, one JSON object. Files are kept in --out (default: a temporary folder).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxembed.data.beir import open_beir
from jaxembed.evaluation.retrieval import ndcg
from jaxembed.search.nearest import search
from jaxembed.training.metrics import read_metrics

HERE = Path(__file__).parent
SIDES = ("sentence-transformers", "jaxembed")


def measured(command: list[str]) -> tuple[dict[str, Any], float]:
    """What a command printed on its last line, as JSON, and the peak memory of its process in GiB."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(lines[-1]), usage.ru_maxrss / 2**20


def train_sentence_transformers(args: argparse.Namespace, seed: int, out: Path) -> dict[str, Any]:
    script = [str(HERE / "finetune_sentence_transformers.py"), args.base, str(args.data), str(out)]
    options = [f"--steps={args.steps}", f"--batch-size={args.batch_size}", f"--seed={seed}", "--warmup-steps=2"]
    result, memory = measured([*script, *options, f"--learning-rate={args.learning_rate}"])
    return {
        "step_seconds": result["seconds_per_step"],
        "median_step_seconds": result["median_seconds_per_step"],
        "tokens_per_second": result["useful_tokens_per_second"],
        "memory": memory,
        "padding": 1 - result["useful_tokens_per_step"] / result["padded_tokens_per_step"],
    }


def train_jaxembed(args: argparse.Namespace, seed: int, out: Path) -> dict[str, Any]:
    config = str(HERE.parent / "configs" / "ag_news.yaml")
    overrides = [
        f"model.base={args.base}", f"data.sources.0.path={args.data}", f"run.dir={out}", f"train.steps={args.steps}",
        f"train.batch_size={args.batch_size}", f"train.seed={seed}", f"optim.learning_rate={args.learning_rate}",
        "optim.warmup_steps=2",
    ]  # fmt: skip
    _, memory = measured(["-m", "jaxembed.train", config, *overrides])
    every = [row for row in read_metrics(out) if "loss" in row]
    rows = [row for row in every if not row["new_programs"]] or every
    seconds = [row["step_seconds"] for row in rows]
    return {
        "step_seconds": statistics.mean(seconds),
        "median_step_seconds": statistics.median(seconds),
        "tokens_per_second": sum(row["useful_tokens_per_second"] * row["step_seconds"] for row in rows) / sum(seconds),
        "memory": memory,
        "padding": statistics.mean(row["padding_fraction"] for row in every),
    }


def encode(side: str, model: str, heldout: Path) -> None:
    """Prints nDCG@10 of a model on a BEIR folder, then for each line that comes the tokens a second of encoding its corpus."""
    beir = open_beir(heldout, ("test", "dev", "train"))
    documents = [beir.document(row) for row in range(len(beir.corpus))]
    queries = [beir.query(i) for i in range(len(beir.query_rows))]
    if side == "jaxembed":
        from jaxembed import cli

        embedder = cli.load_model(model, checkpoint="last")
        lengths = [len(ids) for ids in embedder.tokenizer(documents, [""] * len(documents)).ids]
    else:
        from jaxembed.hub.export import encode_torch, load_sentence_transformer

        torch_model = load_sentence_transformer(Path(model))
        lengths = [len(ids) for ids in torch_model.tokenizer(documents, truncation=True)["input_ids"]]

    def run(texts: list[str]) -> Any:
        return embedder.encode(texts) if side == "jaxembed" else encode_torch(torch_model, texts, "")

    print(ndcg(beir.relevant, search(run(queries), run(documents), 10).rows), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run(documents)
        print(sum(lengths) / (time.perf_counter() - began), flush=True)


def encode_by_turns(models: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of each side the score and the median of its tokens a second."""
    with contextlib.ExitStack() as stack:

        def start(side: str) -> subprocess.Popen[str]:
            command = [sys.executable, __file__, str(models[side]), str(args.data), str(args.heldout), "--encode", side]
            return stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

        def told(process: subprocess.Popen[str]) -> float:
            assert process.stdout is not None
            return float(process.stdout.readline() or sys.exit("encoding failed"))

        def again(process: subprocess.Popen[str]) -> float:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
            return told(process)

        processes = {side: start(side) for side in SIDES}
        scores = {side: told(process) for side, process in processes.items()}
        turns = [{side: again(process) for side, process in processes.items()} for _ in range(5)]
    speeds = {side: statistics.median(turn[side] for turn in turns) for side in SIDES}
    return {side: {"encode_tokens_per_second": speeds[side], "ndcg": scores[side]} for side in SIDES}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--encode", choices=SIDES, help=argparse.SUPPRESS)  # the part of this script's own processes
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.encode:
        encode(args.encode, args.base, args.heldout)
        return
    out = args.out or Path(tempfile.mkdtemp(prefix="vs-"))
    train = {"sentence-transformers": train_sentence_transformers, "jaxembed": train_jaxembed}
    figures: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(args.seeds):
        models = {side: out / f"{side}-{seed}" for side in SIDES}
        order = SIDES if seed % 2 == 0 else SIDES[::-1]
        trained = {side: train[side](args, seed, models[side]) for side in order}
        for side, scored in encode_by_turns(models, args).items():
            figures[side].append(trained[side] | scored)
            print(f"seed {seed}, {side}: {json.dumps(figures[side][-1])}", file=sys.stderr, flush=True)
    report(figures)


def report(figures: dict[str, list[dict[str, Any]]]) -> None:
    """The table of medians over the seeds, and their ratios."""
    names = list(figures["jaxembed"][0])
    median = {side: {name: statistics.median(row[name] for row in rows) for name in names} for side, rows in figures.items()}
    print("| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for side, values in median.items():
        print(f"| {side} | " + " | ".join(f"{values[name]:.4g}" for name in names) + " |")
    theirs, ours = (median[side] for side in SIDES)
    ratios = {
        "train_tokens_ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "encode_tokens_ratio": ours["encode_tokens_per_second"] / theirs["encode_tokens_per_second"],
        "memory_ratio": ours["memory"] / theirs["memory"],
    }
    scores = {side: [round(row["ndcg"], 4) for row in rows] for side, rows in figures.items()}
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()} | {"ndcg": scores}))


if __name__ == "__main__":
    main()
