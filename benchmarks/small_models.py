"""Prune a model and distill it from the original, to compare quality and size.

Usage: python benchmarks/small_models.py MODEL TEXTS STSB BEIR OUT [--steps N]

TEXTS is a JSONL file of rows with query and pos. Their texts determine the vocabulary and the units of the feed-forward layers.
Each pruned model is then trained on them to match the vectors of MODEL. STSB is a file of scored pairs, BEIR a folder. Prints
one row of a table per model, before and after the distillation.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import jax
from jsonl_rows import list_texts, read_rows

from jaxembed import Embedder, cli, prune
from jaxembed.config import EvalSetConfig, parse_config
from jaxembed.data.jsonl import write_jsonl
from jaxembed.evaluation.heldout import HeldOutSet, open_held_out_sets, score_sets
from jaxembed.files import cache_dir
from jaxembed.runs.train import train

# Options of `jaxembed prune` by row. {half}, {third} and {half_mlp} are parts of the model's sizes, {texts} a file.
VARIANTS = {
    "vocabulary of the texts": "--vocabulary-from {texts}",
    "half of the layers": "--layer-count {half}",
    "half of the layers, vocabulary": "--layer-count {half} --vocabulary-from {texts}",
    "half of the layers, half of the MLP, vocabulary": "--layer-count {half} --mlp-width {half_mlp} --activations-from {texts} "
    "--vocabulary-from {texts}",
    "a third of the layers, vocabulary": "--layer-count {third} --vocabulary-from {texts}",
}


def write_texts(source: Path, out: Path) -> None:
    """Write the distinct texts of rows of query and pos, one per row."""
    write_jsonl(out, ({"text": text} for text in list_texts(read_rows(source))))


def distill(student: Path, out: Path, args: argparse.Namespace) -> str:
    """Train a pruned model to match the vectors of the model. Return the run directory."""
    tree: dict[str, Any] = {
        "run": {"dir": str(out)},
        "model": {"base": str(student), "unroll": False},
        "data": {"max_length": 128, "sources": [{"path": str(args.texts), "name": "texts"}]},
        "objectives": [{"name": "embedding_matching", "teacher": args.model}],
        "optim": {"learning_rate": args.learning_rate, "warmup_steps": 10, "schedule": "cosine"},
        "train": {"steps": args.steps, "batch_size": args.batch_size, "eval_every": args.steps, "checkpoint_every": args.steps},
        "eval": {"untrained": False},
        "mesh": {"data": 1},
    }  # fmt: skip
    return str(train(parse_config(tree, "benchmark"))["run_dir"])


def format_row(name: str, model: str, sets: list[HeldOutSet]) -> str:
    """Return one row of the table: millions of parameters, and the score of each set."""
    embedder = Embedder.load(model)
    parameters = sum(x.size for x in jax.tree.leaves(embedder.params)) / 1e6
    scores = score_sets(sets, embedder.encode)
    return f"| {name} | {parameters:.1f} | {scores['sts/spearman']:.3f} | {scores['retrieval/ndcg_at_10']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="model to prune")
    parser.add_argument("texts", metavar="TEXTS", type=Path, help="JSONL file of rows with query and pos")
    parser.add_argument("stsb", metavar="STSB", type=Path, help="file of scored pairs")
    parser.add_argument("beir", metavar="BEIR", type=Path, help="BEIR folder to score")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the models, which must not exist")
    parser.add_argument("--steps", type=int, default=100, help="steps of a distillation (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="(default: %(default)s)")
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    args.out.mkdir()
    texts = args.out / "texts.jsonl"
    write_texts(args.texts, texts)
    configs = [
        EvalSetConfig(name="sts", kind="sts", path=str(args.stsb)), EvalSetConfig(name="retrieval", path=str(args.beir))
    ]  # fmt: skip
    sets = open_held_out_sets(configs, cache_dir())
    print("| model | parameters (M) | Spearman | nDCG@10 |\n|---|---|---|---|", flush=True)
    print(format_row("MODEL", args.model, sets), flush=True)
    transformer = Embedder.load(args.model).model.transformer
    sizes = {"half": transformer.layers // 2, "third": transformer.layers // 3, "half_mlp": transformer.mlp_width // 2}
    for i, (name, options) in enumerate(VARIANTS.items()):
        folder = args.out / f"pruned-{i}"
        arguments = [args.model, str(folder), *options.format(texts=texts, **sizes).split()]
        prune.main(prune.make_parser().parse_args(arguments))
        print(format_row(f"{name}, pruned", str(folder), sets), flush=True)
        print(format_row(f"{name}, distilled", distill(folder, args.out / f"run-{i}", args), sets), flush=True)


if __name__ == "__main__":
    main()
