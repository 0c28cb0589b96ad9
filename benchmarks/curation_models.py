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
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxembed import cli
from jaxembed.config.curation import CurateConfig
from jaxembed.curate import make_context
from jaxembed.curation.engine import curate
from jaxembed.data.jsonl import write_jsonl
from jaxembed.files import cache_dir

Rows = list[dict[str, Any]]
TEMPLATE = (
    "<|im_start|>user\n{instruction}\nQuery: {query}\nDocument: {document}\n"
    "Does the document belong to the query? Answer yes or no.<|im_end|>\n<|im_start|>assistant\n"
)


def run_steps(rows: Rows, steps: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the remaining rows, by id."""
    number = len(list(folder.glob("out*")))
    path, out = folder / f"rows{number}.jsonl", folder / f"out{number}"
    write_jsonl(path, rows)
    tree = {"out": str(out), "metadata": ["id"], "sources": [{"path": str(path), "name": "rows"}], "steps": steps}
    curate(CurateConfig.model_validate(tree), make_context(cache_dir()), "benchmark")
    return {row["id"]: row for row in map(json.loads, (out / "rows.jsonl").read_text().splitlines())}


def measure_duplicates(model: str, data: Path) -> Iterator[str]:
    """Yield a line for each threshold of the cosine of the two sentences."""
    rows = [json.loads(line) for line in (data / "stsb" / "en" / "train.jsonl").read_text().splitlines()]
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
        hits = (found & is_duplicate).sum()
        yield format_line(f"duplicates: semantic, {threshold}", "equal meaning", is_duplicate.sum(), found.sum(), hits)


class ShuffledRows(NamedTuple):
    """Rows of AG News, the ids of those with a wrong positive, and the right positives by row."""

    rows: Rows
    truth: set[str]
    positives: dict[int, list[str]]


def shuffle_positives(data: Path, num_rows: int) -> ShuffledRows:
    """Return rows. The positives of a tenth of them are shuffled."""
    rng = np.random.default_rng(0)
    lines = (data / "ag_news" / "pairs_train.jsonl").read_text().splitlines()[:num_rows]
    right = [json.loads(line) for line in lines]
    wrong = np.sort(rng.choice(num_rows, num_rows // 10, replace=False))
    positives = {i: row["pos"][:1] for i, row in enumerate(right)}
    shuffled = positives | {i: positives[j] for i, j in zip(wrong.tolist(), np.roll(wrong, 1).tolist(), strict=True)}
    rows = [{"id": str(i), "query": row["query"], "pos": shuffled[i]} for i, row in enumerate(right)]
    return ShuffledRows(rows, {str(i) for i in wrong.tolist()}, positives)


def measure_judge(judge: str, shuffled: ShuffledRows, folder: Path) -> Iterator[str]:
    """Yield a line for each limit on the scores of a causal language model."""
    section = {"kind": "causal_lm", "model": judge, "template": TEMPLATE, "max_length": 256}
    scores = [row["pos_scores"][0] for row in run_steps(shuffled.rows, [{"name": "judge", "judge": section}], folder).values()]
    for share in (0.1, 0.2, 0.4):
        limit = float(np.quantile(scores, share))
        left = run_steps(shuffled.rows, [{"name": "judge", "judge": section, "min_positive": limit}], folder)
        found = {row["id"] for row in shuffled.rows} - set(left)
        hits = len(found & shuffled.truth)
        yield format_line(f"judge: min_positive {limit:.2g}", "shuffled positives", len(shuffled.truth), len(found), hits)


def measure_mining(model: str, shuffled_rows: ShuffledRows, folder: Path) -> Iterator[str]:
    """Yield a line for each setting of `mine`."""
    rows, truth, positives = shuffled_rows
    # The texts of all rows are in the corpus, so the right text of a wrong row can be found.
    for top_k in (1, 2, 10, 50):
        step = {"name": "mine", "model": model, "negatives": 0, "consistency_top_k": top_k}
        left = run_steps(rows, [step], folder)
        found = {row["id"] for row in rows} - set(left)
        yield format_line(f"mine: consistency_top_k {top_k}", "shuffled positives", len(truth), len(found), len(found & truth))
    for margin in (0.05, 0.1, 0.2):
        step = {"name": "mine", "model": model, "negatives": 0, "relabel": True, "relabel_margin": margin}
        left = run_steps(rows, [step], folder)
        found = {i for i, row in left.items() if row["pos"] != rows[int(i)]["pos"]}
        repaired = {i for i in found & truth if left[i]["pos"] == positives[int(i)]}
        kind = f"mine: relabel_margin {margin}"
        yield format_line(kind, "shuffled positives (replaced)", len(truth), len(found), len(found & truth))
        yield format_line(kind, "shuffled positives (by their own)", len(truth), len(found), len(repaired))


def format_line(step: str, kind: str, expected: int, found: int, hits: int) -> str:
    """Return a line of the table: expected and found, precision and recall."""
    return (
        f"| {step} | {kind} | {expected:,} | {found:,} | {hits / max(int(found), 1):.3f} | {hits / max(int(expected), 1):.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="rows of AG News")
    parser.add_argument("--judge", metavar="JUDGE", help="a causal language model that also judges positives")
    args = parser.parse_args()
    cli.set_up_jax()
    print("| step | target | injected | found | precision | recall |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for line in measure_duplicates(args.model, args.data):
            print(line, flush=True)
        shuffled = shuffle_positives(args.data, args.rows)
        for line in measure_mining(args.model, shuffled, Path(name)):
            print(line, flush=True)
        for line in measure_judge(args.judge, shuffled, Path(name)) if args.judge else ():
            print(line, flush=True)


if __name__ == "__main__":
    main()
