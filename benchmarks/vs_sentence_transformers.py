#!/usr/bin/env python3
"""Compare jaxembed with sentence-transformers: training and encoding speed, memory and score, in float32.

    python benchmarks/vs_sentence_transformers.py BASE DATA.jsonl HELDOUT [--steps 20] [--seeds 3] [--out DIR]

BASE is a sentence-transformers folder or a decoder folder, DATA a JSONL file of pairs (one positive per line), HELDOUT a BEIR
folder that is encoded and scored. Both sides use the same base, data, batch size, steps and learning rate. For each seed they
train one after the other, each in its own process with all cores; the side that goes first alternates. Then they take turns to
encode. The settings are those of benchmarks/finetune_sentence_transformers.py and configs/ag_news.yaml: no prompts, InfoNCE at
temperature 0.05 with in-batch negatives, AdamW; decoders get causal attention and mean pooling.

`--backend-packages FOLDER` also encodes with the ONNX and OpenVINO backends of sentence-transformers, in float32. FOLDER has
the packages that these backends need: pip install --target FOLDER "sentence-transformers[onnx,openvino]" datasets.

`--embeddings frozen lazy` also trains both sides with a frozen token embedding (`model.frozen`), and jaxembed with lazy updates
of it (`optim.lazy_embedding`).

Token counts exclude padding. Training speed is the sum of tokens over the sum of seconds, of all steps that compile nothing.
It is not a median, because sentence-transformers pads each batch to its longest text: one batch can take twice as long as
another, and a median would ignore the long ones. Memory is the peak of the process.

Prints a Markdown table of medians over the seeds and, on the last line, one JSON object: the ratios and all scores. Models
are written to --out (default: a temporary folder).
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

from script_runs import BENCHMARKS, run_script

from jaxembed.data.beir import open_beir
from jaxembed.evaluation.retrieval import ndcg
from jaxembed.search.nearest import search
from jaxembed.training.metrics import read_metrics

SIDES = ("sentence-transformers", "jaxembed")
EMBEDDINGS = {  # how the token embedding can be trained: overrides of jaxembed
    "dense": [],
    "frozen": ["model.frozen=[embedding]"],
    "lazy": ["optim.lazy_embedding=true"],
}
BACKENDS = {  # of sentence-transformers, and their options for float32
    "onnx": {"provider": "CPUExecutionProvider"},
    "openvino": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
}


def make_model_section(base: str) -> dict[str, Any]:
    """Return the config section of a model: as its folder says, or causal attention and mean pooling for a decoder folder."""
    if Path(base, "modules.json").exists():
        return {"base": base}
    return {"base": base, "attention": "causal", "pooling": {"kind": "mean"}, "append_eos": False}


def train_sentence_transformers(args: argparse.Namespace, seed: int, out: Path, embedding: str) -> dict[str, Any]:
    """Train with sentence-transformers. Return seconds, tokens per second, memory in GiB, and the share of padding.

    Args:
        args: Options of this script.
        seed: Seed of the run.
        out: Folder of the model.
        embedding: How the token embedding is trained: dense or frozen.
    """
    script = [str(BENCHMARKS / "finetune_sentence_transformers.py"), args.base, str(args.data), str(out)]
    options = [f"--steps={args.steps}", f"--batch-size={args.batch_size}", f"--seed={seed}", "--warmup-steps=2"]
    options += ["--frozen-embedding"] if embedding == "frozen" else []
    result, memory = run_script([*script, *options, f"--learning-rate={args.learning_rate}"])
    return {
        "step_seconds": result["seconds_per_step"],
        "median_step_seconds": result["median_seconds_per_step"],
        "tokens_per_second": result["useful_tokens_per_second"],
        "memory": memory,
        "padding": 1 - result["useful_tokens_per_step"] / result["padded_tokens_per_step"],
    }


def train_jaxembed(args: argparse.Namespace, seed: int, out: Path, embedding: str) -> dict[str, Any]:
    """Train with jaxembed and return the same measurements. `embedding` is a key of EMBEDDINGS."""
    config = str(BENCHMARKS.parent / "configs" / "ag_news.yaml")
    overrides = [
        f"model={json.dumps(make_model_section(args.base))}",
        f"data.sources.0.path={args.data}", f"run.dir={out}", f"train.steps={args.steps}",
        f"train.batch_size={args.batch_size}", f"train.seed={seed}", f"optim.learning_rate={args.learning_rate}",
        "optim.warmup_steps=2", *EMBEDDINGS[embedding],
    ]  # fmt: skip
    _, memory = run_script(["-m", "jaxembed.train", config, *overrides])
    all_rows = [row for row in read_metrics(out) if "loss" in row]
    rows = [row for row in all_rows if not row["new_programs"]] or all_rows
    seconds = [row["step_seconds"] for row in rows]
    return {
        "step_seconds": statistics.mean(seconds),
        "median_step_seconds": statistics.median(seconds),
        "tokens_per_second": sum(row["useful_tokens_per_second"] * row["step_seconds"] for row in rows) / sum(seconds),
        "memory": memory,
        "padding": statistics.mean(row["padding_fraction"] for row in all_rows),
    }


def load_backend(name: str, model: str) -> Any:
    """Load a folder with sentence-transformers and one of its backends."""
    if name not in BACKENDS:
        from jaxembed.hub.torch_model import load_sentence_transformer

        return load_sentence_transformer(Path(model))
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model, device="cpu", backend=name, model_kwargs=BACKENDS[name])


def encode(side: str, model: str, heldout: Path) -> None:
    """Print a model's nDCG@10 on a BEIR folder. Then, for each line of standard input, encode the corpus and print tokens/s.

    Args:
        side: Program that encodes: one of `SIDES` or `BACKENDS`.
        model: Run directory or model folder.
        heldout: The BEIR folder.
    """
    beir = open_beir(heldout, ("test", "dev", "train"))
    documents = [beir.get_document_text(row) for row in range(len(beir.corpus))]
    queries = [beir.get_query_text(i) for i in range(len(beir.query_rows))]
    if side == "jaxembed":
        from jaxembed import cli

        embedder = cli.load_model(model, checkpoint="last")
        lengths = [len(ids) for ids in embedder.tokenizer(documents, [""] * len(documents)).ids]
    else:
        from jaxembed.hub.torch_model import encode_torch

        torch_model = load_backend(side, model)
        lengths = [len(ids) for ids in torch_model.tokenizer(documents, truncation=True)["input_ids"]]

    def encode_texts(texts: list[str]) -> Any:
        return embedder.encode(texts) if side == "jaxembed" else encode_torch(torch_model, texts, "")

    print(ndcg(beir.relevant, search(encode_texts(queries), encode_texts(documents), 10).indices).mean(), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        encode_texts(documents)
        print(sum(lengths) / (time.perf_counter() - start), flush=True)


def encode_in_turns(models: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the nDCG@10 and the median encoding speed (tokens per second) of each side, and of the other backends.

    All sides take turns to encode.
    """
    if args.backend_packages and "sentence-transformers" in models:
        models = models | dict.fromkeys(BACKENDS, models["sentence-transformers"])
    with contextlib.ExitStack() as stack:

        def start(side: str) -> subprocess.Popen[str]:
            command = [sys.executable, __file__, str(models[side]), str(args.data), str(args.heldout), "--encode", side]
            packages = [str(args.backend_packages)] if side in BACKENDS else []
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")])}
            pipe = subprocess.PIPE
            return stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))

        def read_number(process: subprocess.Popen[str]) -> float:
            assert process.stdout is not None
            return float(process.stdout.readline() or sys.exit("encoding failed"))

        def measure_speed(process: subprocess.Popen[str]) -> float:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
            return read_number(process)

        processes = {side: start(side) for side in models}
        scores = {side: read_number(process) for side, process in processes.items()}
        rounds = [{side: measure_speed(process) for side, process in processes.items()} for _ in range(args.rounds)]
    speeds = {side: statistics.median(turn[side] for turn in rounds) for side in models}
    return {side: {"encode_tokens_per_second": speeds[side], "ndcg": scores[side]} for side in models}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="sentence-transformers or decoder folder")
    parser.add_argument("data", metavar="DATA.jsonl", type=Path, help="JSONL file of pairs")
    parser.add_argument("heldout", metavar="HELDOUT", type=Path, help="BEIR folder to encode and score")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="(default: %(default)s)")
    parser.add_argument(
        "--embeddings", nargs="+", default=[], choices=["frozen", "lazy"], help="also train the token embedding in these ways"
    )
    parser.add_argument("--out", type=Path, help="folder of the models (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side encodes HELDOUT (default: %(default)s)")
    parser.add_argument("--backend-packages", metavar="FOLDER", type=Path, help="packages of the ONNX and OpenVINO backends")
    # Used by the processes that this script starts.
    parser.add_argument("--encode", choices=[*SIDES, *BACKENDS], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.encode:
        encode(args.encode, args.base, args.heldout)
        return
    out = args.out or Path(tempfile.mkdtemp(prefix="vs-"))
    train = {"sentence-transformers": train_sentence_transformers, "jaxembed": train_jaxembed}
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        order = SIDES if seed % 2 == 0 else SIDES[::-1]
        for embedding in ("dense", *args.embeddings):
            models = {side: out / f"{side}-{seed}-{embedding}" for side in order if side == "jaxembed" or embedding != "lazy"}
            trained = {side: train[side](args, seed, model, embedding) for side, model in models.items()}
            for side, encoded in encode_in_turns(models, args).items():
                name = side if embedding == "dense" else f"{side}, {embedding} embedding"
                results.setdefault(name, []).append(trained.get(side, {}) | encoded)
                print(f"seed {seed}, {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)
    print_report(results)


def compute_ratios(theirs: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    """Return the ratios of speeds and memory of `ours` to `theirs`."""
    return {
        "train_tokens_ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "encode_tokens_ratio": ours["encode_tokens_per_second"] / theirs["encode_tokens_per_second"],
        "memory_ratio": ours["memory"] / theirs["memory"],
    }


def print_report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table of medians over the seeds, and the ratios."""
    names = list(results["jaxembed"][0])
    median = {side: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for side, rows in results.items()}
    print("| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for side, values in median.items():
        print(f"| {side} | " + " | ".join(f"{values[name]:.4g}" if name in values else "" for name in names) + " |")
    ratios = compute_ratios(*(median[side] for side in SIDES))
    ours = median["jaxembed"]
    for name in median.keys() - {*SIDES, *BACKENDS}:
        ratios |= {f"{name}, relative to jaxembed: {key}": value for key, value in compute_ratios(ours, median[name]).items()}
    for name in BACKENDS:
        if name in median:
            ratios[f"encode_{name}_ratio"] = ours["encode_tokens_per_second"] / median[name]["encode_tokens_per_second"]
    scores = {side: [round(row["ndcg"], 4) for row in rows] for side, rows in results.items()}
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()} | {"ndcg": scores}))


if __name__ == "__main__":
    main()
