"""Precision and recall of the steps of `jaxembed curate` that use a model, on injected defects.

Usage: python benchmarks/curation_models.py MODEL DATA [--rows N] [--judge JUDGE]

MODEL is a sentence-transformers model such as all-MiniLM-L6-v2. DATA is a folder with ag_news/pairs_train.jsonl and
stsb/en/train.jsonl. Semantic duplicates: pairs of sentences of STS-B; those with a score of 5 are duplicates, those with a
score up to 3 are not. Mining: rows of AG News (title -> text). A tenth of them have the text of another row. JUDGE is a causal
language model, such as Qwen2.5-Coder-0.5B-Instruct, which judges the same rows. Its limits are the 10%, 20% and 40% quantiles
of the scores of all positives.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from curation_scores import TABLE_HEADER, Rows, StepScore, run_steps, score_step
from jsonl_rows import read_rows

from jaxembed import cli
from jaxembed.files import cache_dir

TEMPLATE = (
    "<|im_start|>user\n{instruction}\nQuery: {query}\nDocument: {document}\n"
    "Does the document belong to the query? Answer yes or no.<|im_end|>\n<|im_start|>assistant\n"
)


def run_step(rows: Rows, step: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows that a step keeps, by id."""
    return run_steps(rows, [step], folder, cache_dir())


def measure_duplicates(model: str, data: Path) -> Iterator[StepScore]:
    """Yield the score of each threshold of the cosine of the two sentences."""
    rows = read_rows(data / "stsb" / "en" / "train.jsonl")
    pairs = [row for row in rows if (row["score"] == 5 or row["score"] <= 3) and row["sentence1"] != row["sentence2"]][:1500]
    is_duplicate = np.array([row["score"] == 5 for row in pairs])
    from jaxembed.data.batch import EncoderInput
    from jaxembed.hub.frozen_encoder import open_frozen_encoder

    encoder = open_frozen_encoder(model, cache_dir())
    first, second = (
        encoder.encode([EncoderInput(row[key], "query", "") for row in pairs]) for key in ("sentence1", "sentence2")
    )
    cosines = np.einsum("nd,nd->n", first, second)
    for threshold in (0.8, 0.85, 0.9, 0.95):
        found = cosines >= threshold
        counts = (int(np.sum(x)) for x in (is_duplicate, found, found & is_duplicate))
        yield StepScore(f"duplicates: semantic, {threshold}", "equal meaning", *counts)


class ShuffledRows(NamedTuple):
    """Rows of AG News; some have the positive of another row.

    Attributes:
        rows: The rows. The id of a row is its index.
        wrong_ids: Ids of the rows with a wrong positive.
        right_positives: The right positives of each row.
    """

    rows: Rows
    wrong_ids: set[str]
    right_positives: list[list[str]]


def shuffle_positives(data: Path, num_rows: int) -> ShuffledRows:
    """Return rows of AG News. The positives of a tenth of them are shuffled."""
    rng = np.random.default_rng(0)
    right = read_rows(data / "ag_news" / "pairs_train.jsonl")[:num_rows]
    wrong = np.sort(rng.choice(num_rows, num_rows // 10, replace=False))
    right_positives = [row["pos"][:1] for row in right]
    positives = list(right_positives)
    for i, j in zip(wrong.tolist(), np.roll(wrong, 1).tolist(), strict=True):
        positives[i] = right_positives[j]
    rows = [{"id": str(i), "query": row["query"], "pos": positives[i]} for i, row in enumerate(right)]
    return ShuffledRows(rows, {str(i) for i in wrong.tolist()}, right_positives)


def measure_mining(model: str, shuffled: ShuffledRows, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of `mine` by setting: of the consistency filter, and of relabeling."""
    rows, wrong_ids, right_positives = shuffled
    # The texts of all rows are in the corpus, so the right text of a wrong row can be found.
    for top_k in (1, 2, 10, 50):
        remaining = run_step(rows, {"name": "mine", "model": model, "negatives": 0, "consistency_top_k": top_k}, folder)
        dropped = {row["id"] for row in rows} - set(remaining)
        yield score_step(f"mine: consistency_top_k {top_k}", "shuffled positives", dropped, wrong_ids)
    for margin in (0.05, 0.1, 0.2):
        step = {"name": "mine", "model": model, "negatives": 0, "relabel": True, "relabel_margin": margin}
        remaining = run_step(rows, step, folder)
        replaced = {i for i, row in remaining.items() if row["pos"] != rows[int(i)]["pos"]}
        score = score_step(f"mine: relabel_margin {margin}", "shuffled positives (replaced)", replaced, wrong_ids)
        yield score
        repaired = {i for i in replaced & wrong_ids if remaining[i]["pos"] == right_positives[int(i)]}
        yield score._replace(target="shuffled positives (by their own)", hits=len(repaired))


def measure_judge(judge: str, shuffled: ShuffledRows, folder: Path) -> Iterator[StepScore]:
    """Yield the score of each limit on the scores of a causal language model."""
    section = {"kind": "causal_lm", "model": judge, "template": TEMPLATE, "max_length": 256}
    judged = run_step(shuffled.rows, {"name": "judge", "judge": section}, folder)
    scores = [row["pos_scores"][0] for row in judged.values()]
    for share in (0.1, 0.2, 0.4):
        limit = float(np.quantile(scores, share))
        remaining = run_step(shuffled.rows, {"name": "judge", "judge": section, "min_positive": limit}, folder)
        dropped = {row["id"] for row in shuffled.rows} - set(remaining)
        yield score_step(f"judge: min_positive {limit:.2g}", "shuffled positives", dropped, shuffled.wrong_ids)


def measure(args: argparse.Namespace, folder: Path) -> Iterator[StepScore]:
    """Yield the score of every step."""
    yield from measure_duplicates(args.model, args.data)
    shuffled = shuffle_positives(args.data, args.rows)
    yield from measure_mining(args.model, shuffled, folder)
    if args.judge:
        yield from measure_judge(args.judge, shuffled, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="sentence-transformers model")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the data sets")
    parser.add_argument("--rows", type=int, default=2000, help="rows of AG News (default: %(default)s)")
    parser.add_argument("--judge", metavar="JUDGE", help="causal language model that also judges positives")
    args = parser.parse_args()
    cli.set_up_jax()
    print(TABLE_HEADER, flush=True)
    with tempfile.TemporaryDirectory() as name:
        for score in measure(args, Path(name)):
            print(score.format_row(), flush=True)


if __name__ == "__main__":
    main()
