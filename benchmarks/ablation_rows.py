"""The rows of the ablations of NV-Embed and KaLM-Embedding, and what the papers report about them (ablations.py)."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxembed.config.stage import merge_trees

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


# Configs


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
