#!/usr/bin/env python3
"""Run the ablations of NV-Embed and KaLM-Embedding that suit a small model, and compare the signs of the effects.

    python benchmarks/ablations.py BASE DATA MINER OUT.jsonl [--only pooling stages ...] [--steps 60] [--seeds 3]

BASE is the folder of a small pretrained decoder. DATA is a folder with ag_news/pairs_train.jsonl (pairs), ag_news/retrieval (a
BEIR folder of the same kind), banking77/{train,test}.jsonl (texts and labels) and stsb/en/{train,test}.jsonl (scored pairs).
MINER is an embedding model that finds hard negatives, such as MiniLM.

Every row of an ablation is trained from BASE, once per seed; rows with the same config share their runs. Scores: nDCG@10 of the
BEIR folder, Spearman's correlation of the scored pairs, and the accuracy of logistic regression on the labels. Each finished
run is one line of OUT.jsonl, and later commands with the same settings do not repeat it. Prints the tables, with the papers'
differences next to ours; --report only prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation_rows import INSTRUCTIONS, Claim, RowKey, Settings, find_trained_rows, list_ablations, make_tree
from finished_runs import FinishedRuns, Scores
from table_cells import format_mean

from jaxembed import Embedder, cli
from jaxembed.config import EvalSetConfig, parse_config
from jaxembed.config.stage import merge_trees
from jaxembed.evaluation.heldout import open_held_out_sets, score_set
from jaxembed.files import cache_dir
from jaxembed.runs.train import train

SCORES = ("retrieval", "sts", "classification")


# A run


def train_row(settings: Settings, changes: Mapping[str, Any], seed: int, folder: Path) -> None:
    """Train a row with one seed. `changes` are those of the row, and `folder` becomes the run directory."""
    train(
        parse_config(
            merge_trees(make_tree(settings, changes), {"run": {"dir": str(folder)}, "train": {"seed": seed}}), "ablation"
        )
    )


def score_model(settings: Settings, model: str, has_instructions: bool, widths: Sequence[int]) -> Scores:
    """Score a model on the held-out parts of the data.

    Args:
        settings: The settings.
        model: Run directory.
        has_instructions: Whether queries get their instructions.
        widths: Widths below that of the model to which vectors are truncated.

    Returns:
        The scores of `SCORES` by name, those of truncated vectors as NAME@WIDTH, and the mean of the full width.
    """
    embedder = Embedder.load(model, dtype=settings.dtype)
    paths = {"retrieval": ("news", "ag_news/retrieval"), "sts": ("similar", "stsb/en/test.jsonl"),
             "classification": ("banking", "banking77/test.jsonl")}  # fmt: skip
    sections = [
        {"name": kind, "kind": kind, "path": str(settings.data / path),
         "instruction": INSTRUCTIONS[name] if has_instructions else ""}
        for kind, (name, path) in paths.items()
    ]  # fmt: skip
    sections[-1]["train_path"] = str(settings.data / "banking77" / "train.jsonl")
    held_out_sets = open_held_out_sets([EvalSetConfig.model_validate(section) for section in sections], cache_dir())
    scores = {}
    for dim in (None, *widths):
        encode = functools.partial(embedder.encode, dim=dim)
        for held_out in held_out_sets:
            scores[held_out.config.name + (f"@{dim}" if dim else "")] = score_set(held_out, encode).scores[held_out.metric]
    return scores | {"mean": statistics.mean(scores[name] for name in SCORES)}


# Results


def run_missing(settings: Settings, names: Sequence[str], seeds: int, finished: FinishedRuns) -> None:
    """Train and score the runs that the results lack."""
    ablations, trained_rows = list_ablations(settings), find_trained_rows(settings)
    for name in names:
        for row, changes in ablations[name].rows.items():
            key = trained_rows[RowKey(name, row)]
            for seed in range(seeds):
                measure = functools.partial(measure_run, settings, key, changes, seed)
                finished.run_missing(measure, **key._asdict(), seed=seed)


def measure_run(settings: Settings, key: RowKey, changes: Mapping[str, Any], seed: int, folder: Path) -> Scores:
    """Train a row and return its scores. `folder` becomes the run directory."""
    train_row(settings, changes, seed, folder)
    widths = settings.widths if key.scores_widths else ()
    return score_model(settings, str(folder), key.has_instructions, widths)


def judge_claim(claim: Claim, values: Mapping[str, Sequence[float]]) -> tuple[str, str]:
    """Compare our scores with a claim.

    Args:
        claim: The claim.
        values: Our scores by row, one per seed.

    Returns:
        Our difference with its spread over the seeds, and the direction. A difference within the spread has none.
    """
    higher, lower = values[claim.higher], values[claim.lower]
    difference = statistics.mean(higher) - statistics.mean(lower)
    if min(len(higher), len(lower)) < 2:
        return f"{difference:+.4f}", "one seed"
    spread = (statistics.variance(higher) + statistics.variance(lower)) ** 0.5
    verdict = "none" if abs(difference) <= spread else "the paper's" if difference > 0 else "the opposite"
    return f"{difference:+.4f} ± {spread:.4f}", verdict


def print_report(settings: Settings, names: Sequence[str], finished: FinishedRuns) -> None:
    """Print the tables of finished runs."""
    trained_rows = find_trained_rows(settings)
    for name in names:
        ablation = list_ablations(settings)[name]
        runs = {row: finished.read(**trained_rows[RowKey(name, row)]._asdict()) for row in ablation.rows}
        done = {row: row_runs for row, row_runs in runs.items() if row_runs}
        if not done:
            continue
        scores = sorted(next(iter(done.values()))[0]["scores"], key=lambda score: (score != "mean", "@" in score))
        print(f"## {name}\n\n| row | seeds | {' | '.join(scores)} | minutes a run |\n|---|---|{'---|' * len(scores)}---|")
        for row, row_runs in done.items():
            cells = [format_mean([run["scores"][score] for run in row_runs], 4) for score in scores]
            minutes = statistics.mean(run["minutes"] for run in row_runs)
            print(f"| {row} | {len(row_runs)} | {' | '.join(cells)} | {minutes:.1f} |")
        print("\n| higher | lower | score | paper | ours | direction |\n|---|---|---|---|---|---|")
        for claim in ablation.claims:
            if {claim.higher, claim.lower} <= done.keys():
                values = {row: [run["scores"][claim.score] for run in done[row]] for row in (claim.higher, claim.lower)}
                print(f"| {' | '.join((*claim, *judge_claim(claim, values)))} |")
        print(flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="folder of a small pretrained decoder")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the training and test files")
    parser.add_argument("miner", metavar="MINER", help="embedding model that finds hard negatives")
    parser.add_argument("out", metavar="OUT.jsonl", type=Path, help="file of the finished runs")
    parser.add_argument("--only", nargs="*", metavar="ABLATION", help="names of ablations (default: all)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="queries a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--negatives", type=int, default=3, help="hard negatives per query (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="print the tables of finished runs without training")
    args = parser.parse_args(arguments)
    cli.set_up_jax()
    logging.getLogger("jaxembed").setLevel(logging.WARNING)
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    names = args.only or list(list_ablations(settings))
    if unknown := set(names) - set(list_ablations(settings)):
        parser.error(f"--only: no such ablation {unknown.pop()!r} (expected: {', '.join(list_ablations(settings))})")
    finished = FinishedRuns(args.out, dataclasses.asdict(settings))
    if not args.report:
        run_missing(settings, names, args.seeds, finished)
    print_report(settings, names, finished)


if __name__ == "__main__":
    main()
