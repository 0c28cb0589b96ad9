"""Adapt a model before contrastive training, or add objectives, exits or quantization to it, and compare with InfoNCE alone.

Usage: python benchmarks/adaptation.py BASE PAIRS HELDOUT OUT.jsonl [--steps N] [--seeds N] [--only NAME ...]

BASE is the folder of a causal language model. An encoder can train the rows that predict no tokens (--only). PAIRS is a JSONL
file of rows with query and pos, such as the train.jsonl that `python -m jaxembed.data packages` writes, and HELDOUT a BEIR
folder of the same kind. The adaptations train on the texts of PAIRS, GRIT answers a query with its positive, and --teacher
names the model whose vectors are matched. Every row ends with the same number of steps on pairs.
Each finished run is one line of OUT.jsonl, and later commands with the same settings do not repeat it. Prints the nDCG@10 of
HELDOUT, and the losses of the answers in the first and in the last steps, on texts that were not seen before. With --versions,
rows with exits and with quantized vectors are trained too, and every model is scored after its first layers and quantized.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from finished_runs import FinishedRuns, Scores
from jsonl_rows import list_texts, read_rows
from table_cells import format_mean
from vector_versions import QUANTIZED, WHOLE, list_exits, name_exit, score_versions

from jaxembed import Embedder, cli
from jaxembed.config import EvalSetConfig, parse_config
from jaxembed.data.jsonl import write_jsonl
from jaxembed.evaluation.heldout import HeldOutSet, open_held_out_sets, score_set
from jaxembed.files import cache_dir
from jaxembed.runs.train import train
from jaxembed.search.precision import RANGES_FILE, merge_ranges
from jaxembed.training.metrics import read_metrics

UNTRAINED = "untrained"
FIRST_ANSWERS, LAST_ANSWERS = "answers, first steps", "answers, last steps"
ANSWER_STEPS = 3  # steps whose losses of answers are averaged
RANGE_TEXTS = 500  # texts of the pairs whose vectors give the ranges of int8
INFONCE = {"name": "infonce", "temperature": 0.05}
LORA = {"rank": 16, "alpha": 32}


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        stages: Its stages.
        lora: Adapters that are trained instead of the whole model, if any.
    """

    stages: Sequence[dict[str, Any]]
    lora: dict[str, Any] | None = None


def write_sources(folder: Path, pairs: Path) -> dict[str, str]:
    """Write the texts of pairs one by one, and as conversations. Return the path of each source by name."""
    rows = read_rows(pairs)
    contents: dict[str, Iterable[dict[str, Any]]] = {
        "texts": ({"text": text} for text in list_texts(rows)),
        "chats": ({"prompt": row["query"], "response": row["pos"][0]} for row in rows),
    }
    paths = {name: folder / f"{name}.jsonl" for name in contents}
    for name, content in contents.items():
        write_jsonl(paths[name], content)
    return {"pairs": str(pairs), **{name: str(path) for name, path in paths.items()}}


def list_rows(paths: dict[str, str], exits: list[int], args: argparse.Namespace) -> dict[str, Row]:
    """Return the rows by name.

    Args:
        paths: Path of each source by name, and of the ranges of int8.
        exits: Exits of the row that has fixed ones.
        args: The command line.
    """

    def make_stage(objectives: list[dict[str, Any]], *sources: str, **train_keys: Any) -> dict[str, Any]:
        steps = args.steps if "pairs" in sources else args.adaptation_steps
        listed = [{"path": paths[name], "name": name} for name in sources]
        return {"objectives": objectives, "data": {"sources": listed}, "train": {"steps": steps, **train_keys}}

    contrastive = make_stage([INFONCE], "pairs")
    mntp = make_stage([{"name": "mntp"}], "texts")
    simcse = make_stage([INFONCE], "texts", dropout={"attention": 0.3})
    matching = {"name": "embedding_matching", "teacher": args.teacher}
    rates = {"mask_rate": 0.001, "max_mask_rate": 1.0, "mask_rule": "all", "token_weight": "inverse_rate"}
    grit, near_grit = (
        make_stage([INFONCE, {"name": "causal_lm", "kl_to_base": weight}], "pairs", "chats") for weight in (0.0, 1.0)
    )
    versions: dict[str, dict[str, Any]] = {
        "InfoNCE, fixed exits": {"exits": {"layers": exits}},
        "InfoNCE, 2DMSE": {"matryoshka": {"dims": [128]}, "exits": {"random": 1, "align": 0.3}},
        "InfoNCE, int8 and binary": {"quantization": {"precisions": QUANTIZED, "ranges": paths["ranges"]}},
    }
    rows = {
        "InfoNCE": Row([contrastive]),
        "MNTP, then InfoNCE": Row([mntp, contrastive]),
        "MNTP, SimCSE, then InfoNCE (LLM2Vec)": Row([mntp, simcse, contrastive]),
        "GRIT: InfoNCE and answers": Row([grit]),
        "GRIT with adapters": Row([grit], LORA),
        "GRIT with adapters, KL to the base": Row([near_grit], LORA),
        "SimCSE, then InfoNCE": Row([simcse, contrastive]),
        "masked diffusion, then InfoNCE": Row([make_stage([{"name": "mntp", **rates}], "texts"), contrastive]),
    }
    if args.versions:
        rows |= {name: Row([contrastive | changes]) for name, changes in versions.items()}
    if args.teacher:
        rows["embedding matching"] = Row([make_stage([matching], "pairs")])
        rows["InfoNCE and embedding matching"] = Row([make_stage([INFONCE, matching], "pairs")])
    return rows


def train_row(row: Row, seed: int, run: Path, args: argparse.Namespace) -> None:
    """Train a row with one seed. `run` becomes the run directory."""
    first, *_ = row.stages
    tree: dict[str, Any] = {
        "run": {"dir": str(run)},
        "model": {"base": args.base, "attention": "bidirectional", "pooling": {"kind": "mean"}, "unroll": False,
                  "dtype": args.dtype, "lora": row.lora},
        "data": {"max_length": args.max_length, **first["data"]},
        "optim": {"learning_rate": args.learning_rate, "warmup_steps": 3},
        "train": {"batch_size": args.batch_size, "seed": seed, "log_every": 1, "eval_every": 10**6, "checkpoint_every": 10**6},
        "eval": {"untrained": False},
        "mesh": {"data": 1},
        "stages": row.stages,
    }  # fmt: skip
    train(parse_config(tree, "benchmark"))


def load_untrained(args: argparse.Namespace) -> Embedder:
    """Return BASE with the attention, the pooling and the maximum length of the runs."""
    embedder = Embedder.load(args.base)
    spec = embedder.spec.replace(attention="bidirectional", pooling="mean", max_length=args.max_length)
    return embedder.with_spec(spec)


def score_model(embedder: Embedder, held_out: HeldOutSet, range_texts: list[str]) -> Scores:
    """Return the nDCG@10 of a model, and if there are texts for the ranges of int8, that of its versions."""
    if range_texts:
        return score_versions(embedder, held_out, range_texts)
    return {WHOLE: score_set(held_out, embedder.encode).items.score}


def score_run(run: Path, held_out: HeldOutSet, range_texts: list[str]) -> Scores:
    """Return the scores of a run, and its losses of answers if it has any."""
    scores = score_model(Embedder.load(run), held_out, range_texts)
    if losses := [row["causal_lm"] for row in read_metrics(run) if "causal_lm" in row]:
        scores[FIRST_ANSWERS] = statistics.mean(losses[:ANSWER_STEPS])
        scores[LAST_ANSWERS] = statistics.mean(losses[-ANSWER_STEPS:])
    return scores


def print_table(names: list[str], exits: list[int], finished: FinishedRuns) -> None:
    """Print the table of finished runs."""
    runs = finished.read()
    columns = [name for name in (WHOLE, *map(name_exit, exits), *QUANTIZED, FIRST_ANSWERS, LAST_ANSWERS)
               if any(name in run["scores"] for run in runs)]  # fmt: skip
    print(f"| trained with | seeds | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|")
    for name in names:
        if not (runs := [run["scores"] for run in finished.read(row=name)]):
            continue
        cells = [format_mean(values, 4) if (values := [run[column] for run in runs if column in run]) else ""
                 for column in columns]  # fmt: skip
        print(f"| {name} | {len(runs)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="folder of a causal language model")
    parser.add_argument("pairs", metavar="PAIRS", type=Path, help="JSONL file of rows with query and pos")
    parser.add_argument("heldout", metavar="HELDOUT", help="BEIR folder to score")
    parser.add_argument("out", metavar="OUT.jsonl", type=Path, help="file of the finished runs")
    parser.add_argument("--teacher", metavar="MODEL", help="embedding model to match (default: no such rows)")
    parser.add_argument("--versions", action="store_true", help="also train and score exits and quantized vectors")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="train only these rows")
    parser.add_argument("--steps", type=int, default=100, help="contrastive steps (default: %(default)s)")
    parser.add_argument("--adaptation-steps", type=int, default=100, help="steps of other stages (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts or pairs of a step (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="maximum tokens of a text (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    args = parser.parse_args()
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    [held_out] = open_held_out_sets([EvalSetConfig(name="heldout", path=args.heldout)], cache_dir())
    untrained = load_untrained(args)
    range_texts = list_texts(read_rows(args.pairs))[:RANGE_TEXTS] if args.versions else []
    if range_texts:
        np.save(folder / RANGES_FILE, merge_ranges(None, untrained.encode(range_texts)))
    exits, paths = list_exits(untrained), {**write_sources(folder, args.pairs), "ranges": str(folder / RANGES_FILE)}
    rows = list_rows(paths, exits, args)
    if unknown := set(args.only or []) - rows.keys():
        parser.error(f"--only: no such row {unknown.pop()!r} (expected: {', '.join(rows)})")
    ignored = ("out", "only", "seeds")
    finished = FinishedRuns(args.out, {name: value for name, value in vars(args).items() if name not in ignored})
    finished.run_missing(lambda _: score_model(untrained, held_out, range_texts), row=UNTRAINED, seed=0)

    def measure(row: Row, seed: int, run: Path) -> Scores:
        train_row(row, seed, run, args)
        return score_run(run, held_out, range_texts)

    for name in args.only or rows:
        for seed in range(args.seeds):
            finished.run_missing(functools.partial(measure, rows[name], seed), row=name, seed=seed)
    print_table([UNTRAINED, *rows], exits, finished)


if __name__ == "__main__":
    main()
