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
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finished_runs import FinishedRuns, Scores
from table_cells import format_mean

from jaxembed import Embedder, cli
from jaxembed.config import EvalSetConfig, parse_config
from jaxembed.config.stage import merge_trees
from jaxembed.evaluation.heldout import open_held_out_sets, score_set
from jaxembed.files import cache_dir
from jaxembed.runs.train import train

SCORES = ("retrieval", "sts", "classification")
INSTRUCTIONS = {
    "news": "Given a headline, retrieve its news text",
    "banking": "Given a online banking query, find the corresponding intents",
    "similar": "Retrieve semantically similar text.",
}
WIDTHS = (512, 256, 128, 64)  # KaLM, section 2.2
FACTORS = (1, 3)  # of the batch size and the number of epochs


class Claim(NamedTuple):
    """A difference that a paper reports.

    Attributes:
        higher: Row with the higher score.
        lower: Row with the lower score.
        score: Name of the score.
        paper: The table of the paper, with both scores.
    """

    higher: str
    lower: str
    score: str
    paper: str


class Ablation(NamedTuple):
    """An ablation.

    Attributes:
        rows: Changes to the config by row.
        claims: What the paper reports about the rows.
    """

    rows: Mapping[str, Mapping[str, Any]]
    claims: Sequence[Claim]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all runs share, from the command line.

    Attributes:
        base: Folder of the base model.
        data: Folder of the training and test files.
        miner: Embedding model that finds hard negatives.
        steps: Training steps of a run.
        batch_size: Queries per step.
        learning_rate: Peak learning rate.
        negatives: Hard negatives per query.
        max_length: Tokens to which texts are truncated.
        dtype: Data type of matmuls.
    """

    base: str
    data: Path
    miner: str
    steps: int
    batch_size: int
    learning_rate: float
    negatives: int
    max_length: int
    dtype: str

    @functools.cached_property
    def widths(self) -> list[int]:
        """The widths to which vectors are truncated: those of KaLM below the width of the base."""
        width = json.loads((Path(self.base) / "config.json").read_text())["hidden_size"]
        return [dim for dim in WIDTHS if dim < width]


# The rows


def make_sources(data: Path, *names: str, **changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `data` section of the named sources. `changes` replaces keys of a source."""
    sources: dict[str, dict[str, Any]] = {
        "news": {"path": str(data / "ag_news" / "pairs_train.jsonl"), "format": "pairs"},
        "banking": {"path": str(data / "banking77" / "train.jsonl"), "format": "labels", "single_labels": "skip"},
        "similar": {"path": str(data / "stsb" / "en" / "train.jsonl"), "format": "scored_pairs", "symmetric": True},
    }
    return {"sources": [
        {"name": name, "instructions": [INSTRUCTIONS[name]], **sources[name], **changes.get(name, {})} for name in names
    ]}  # fmt: skip


def list_ablations(settings: Settings) -> dict[str, Ablation]:
    """Return the ablations by name."""
    return {
        "pooling": make_pooling_ablation(),
        "stages": make_stage_ablation(settings),
        "negatives": make_negative_ablation(),
        "labels": make_label_ablation(settings),
        "instructions": make_instruction_ablation(settings),
        "widths": make_width_ablation(settings),
        "batches": make_batch_ablation(settings),
    }


def make_pooling_ablation() -> Ablation:
    """Return four poolings with two masks (NV-Embed, Table 2: averages over 56 tasks after both stages)."""
    averages = {  # with both masks
        "last": (67.85, 66.50),
        "mean": (68.97, 68.13),
        "latent_attention": (69.32, 68.47),
        "self_attention": (69.10, 68.16),
    }
    masks = ("bidirectional", "causal")
    rows = {f"{kind}, {mask}": {"model": {"attention": mask, "pooling": {"kind": kind}}} for kind in averages for mask in masks}
    claims = [
        Claim(f"{kind}, {masks[0]}", f"{kind}, {masks[1]}", "mean", f"NV-Embed, Table 2: {both[0]} and {both[1]}")
        for kind, both in averages.items()
    ]
    for higher, lower in (("mean", "last"), ("latent_attention", "mean")):
        numbers = f"NV-Embed, Table 2: {averages[higher][0]} and {averages[lower][0]}"
        claims.append(Claim(f"{higher}, {masks[0]}", f"{lower}, {masks[0]}", "mean", numbers))
    return Ablation(rows, claims)


def make_stage_ablation(settings: Settings) -> Ablation:
    """Return one stage, two stages, and stages with in-batch negatives (NV-Embed, Table 4, section 5.3.1)."""
    hard = {"objectives": [{"name": "infonce", "temperature": 0.05, "negatives": "hard"}]}
    news, all_sources = ({"data": make_sources(settings.data, *names)} for names in (["news"], INSTRUCTIONS))
    in_batch = {"data": make_sources(settings.data, *INSTRUCTIONS, banking={"in_batch_negatives": True})}
    half = {"train": {"steps": max(settings.steps // 2, 1)}}
    first, second = half | news, half | all_sources | hard
    rows: dict[str, dict[str, Any]] = {
        "one stage, in-batch": in_batch,
        "one stage": hard,
        "two stages": {"stages": [first, second]},
        "two stages, reversed": {"stages": [second, first]},
        "two stages, in-batch in both": {"stages": [first, half | in_batch]},
    }
    where = "NV-Embed, Table 4"
    claims = [
        Claim("one stage", "one stage, in-batch", "classification", f"{where}: 90.2 and 86.6"),
        Claim("two stages", "one stage", "retrieval", f"{where}: 62.65 and 61.37"),
        Claim("two stages", "two stages, reversed", "retrieval", f"{where}: 62.65 and 61.91"),
        Claim("two stages, reversed", "one stage", "retrieval", f"{where}: 61.91 and 61.37"),
        Claim("one stage", "two stages, reversed", "sts", f"{where}: 84.5 and 83.07"),
    ]
    return Ablation(rows, claims)


def make_negative_ablation() -> Ablation:
    """Return hard negatives (NV-Embed, Table 4, section 5.3.5), and the window and filter of KaLM (section 3.1, Table 3)."""
    window = {"rule": "window", "window": [50, 100]}
    rows: dict[str, dict[str, Any]] = {
        "none": {"data": {"hard_negatives": 0}, "mine": None},
        "mined (95% of the positive)": {},
        "mined (ranks 50 to 100)": {"mine": window},
        "mined (ranks 50 to 100), consistent": {"mine": window | {"consistency_top_k": 50}},
    }
    names = list(rows)
    claims = [
        Claim(names[1], names[0], "retrieval", "NV-Embed, Table 4, S1 and S0: 61.52 and 59.22"),
        Claim(names[3], names[2], "mean", "KaLM, Table 3, English: 64.94 and 64.19"),
    ]
    return Ablation(rows, claims)


def make_label_ablation(settings: Settings) -> Ablation:
    """Return examples and labels as the documents of classes (NV-Embed, Table 5)."""
    rows = {
        kind: {"data": make_sources(settings.data, *INSTRUCTIONS, banking={"label_documents": kind})}
        for kind in ("examples", "labels")
    }
    return Ablation(rows, [Claim("examples", "labels", "classification", "NV-Embed, Table 5, average: 69.27 and 64.80")])


def make_instruction_ablation(settings: Settings) -> Ablation:
    """Return training with and without instructions (KaLM, Table 3)."""
    none: dict[str, dict[str, Any]] = {name: {"instructions": []} for name in INSTRUCTIONS}
    rows: dict[str, dict[str, Any]] = {"with": {}, "without": {"data": make_sources(settings.data, *INSTRUCTIONS, **none)}}
    return Ablation(rows, [Claim("with", "without", "mean", "KaLM, Table 3, English: 64.94 and 61.13")])


def make_width_ablation(settings: Settings) -> Ablation:
    """Return truncated vectors with and without Matryoshka training (KaLM, Figure 4a, which has no numbers)."""
    dims = settings.widths
    rows = {"Matryoshka": {"matryoshka": {"dims": dims, "weights": [0.3, 0.2, 0.1, 0.1][-len(dims) :]}}, "plain": {}}
    claims = [Claim("Matryoshka", "plain", f"retrieval@{dim}", "KaLM, Figure 4a: higher when truncated") for dim in dims]
    return Ablation(rows, claims)


def make_batch_ablation(settings: Settings) -> Ablation:
    """Return one and three times the batch and the epochs, with and without a mask of false negatives (KaLM, Figure 5)."""
    rows = {}
    for masked in (False, True):
        infonce = {"name": "infonce", "temperature": 0.05} | ({"margin": 0.1} if masked else {})
        for size in FACTORS:
            for epochs in FACTORS:
                keys = {"batch_size": size * settings.batch_size, "steps": max(settings.steps * epochs // size, 1)}
                rows[name_batch(size, epochs, masked)] = {"train": keys, "objectives": [infonce]}
    claims = []
    for masked in (False, True):
        one, three, large = (name_batch(*sizes, masked) for sizes in ((1, 1), (1, 3), (3, 3)))
        claims.append(Claim(three, one, "mean", "KaLM, Figure 5: more steps are better"))
        claims.append(Claim(one, large, "mean", "KaLM, Figure 5: with as many steps, a larger batch is not better"))
    return Ablation(rows, claims)


def name_batch(size: int, epochs: int, masked: bool) -> str:
    """Return the name of a row of Figure 5."""
    return f"batch x {size}, epochs: {epochs}" + (", masked" if masked else "")


# A run


def make_tree(settings: Settings, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a row without its seed and its run directory. `changes` are those of the row."""
    train_keys = {"batch_size": settings.batch_size, "log_every": 10, "checkpoint_every": 10**6}
    tree: dict[str, Any] = {
        "model": {"base": settings.base, "attention": "bidirectional", "pooling": {"kind": "mean"}, "unroll": False,
                  "dtype": settings.dtype},
        "data": {"max_length": settings.max_length, "hard_negatives": settings.negatives,
                 **make_sources(settings.data, *INSTRUCTIONS)},
        "objectives": [{"name": "infonce", "temperature": 0.05}],
        "mine": {"model": settings.miner, "rule": "topk_perc_pos", "negatives": settings.negatives},
        "optim": {"learning_rate": settings.learning_rate, "warmup_steps": 5},
        "train": train_keys if "stages" in changes else train_keys | {"steps": settings.steps},
        "mesh": {"data": 1},
    }  # fmt: skip
    return merge_trees(tree, changes)


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


class RowKey(NamedTuple):
    """Identifies a row.

    Attributes:
        ablation: Name of its ablation.
        row: Name of the row in its ablation.
    """

    ablation: str
    row: str

    @property
    def has_instructions(self) -> bool:
        """Whether the queries of its scores get their instructions."""
        return self != ("instructions", "without")

    @property
    def scores_widths(self) -> bool:
        """Whether its truncated vectors are scored too."""
        return self.ablation == "widths"


def find_trained_rows(settings: Settings) -> dict[RowKey, RowKey]:
    """Return which row each row shares its runs with: the first row whose config and scores are the same, often itself."""
    trees = {
        RowKey(name, row): make_tree(settings, changes)
        for name, ablation in list_ablations(settings).items()
        for row, changes in ablation.rows.items()
    }

    def find_first(key: RowKey) -> RowKey:
        return next(first for first in trees if trees[first] == trees[key] and first.scores_widths == key.scores_widths)

    return {key: find_first(key) for key in trees}


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
