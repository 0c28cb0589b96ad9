"""Precision and recall of the steps of `jaxembed curate` on real data with injected defects.

Usage: python benchmarks/curation.py DATA [--rows N]

DATA is a folder with ag_news/pairs_train.jsonl, ag_news/retrieval (BEIR) and stsb/{de,fr,pl}/train.jsonl. Rows of AG News
(title -> text) are mixed with rows that a step should find. Each step runs alone on the mixture.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.curation import CurateConfig
from jaxembed.curate import make_context
from jaxembed.curation.engine import curate
from jaxembed.data.beir import EVALUATION_SPLITS, open_beir
from jaxembed.data.jsonl import write_jsonl

INJECTED = 200  # rows of each kind
FOREIGN = ("de", "fr", "pl")
Rows = list[dict[str, Any]]


def read_pairs(data: Path, max_rows: int) -> Rows:
    lines = (data / "ag_news" / "pairs_train.jsonl").read_text().splitlines()[:max_rows]
    rows = [json.loads(line) for line in lines]
    return [{"id": f"clean-{i}", "query": row["query"], "pos": row["pos"][:1]} for i, row in enumerate(rows)]


def read_foreign(data: Path) -> list[tuple[str, str]]:
    """Return translated pairs of similar sentences."""
    pairs = []
    for language in FOREIGN:
        rows = [json.loads(line) for line in (data / "stsb" / language / "train.jsonl").read_text().splitlines()]
        pairs += [(row["sentence1"], row["sentence2"]) for row in rows if row["score"] >= 4]
    return pairs


def read_held_out(data: Path) -> list[tuple[str, str]]:
    """Return the queries of the held-out BEIR folder with their documents of 20 words or more."""
    beir = open_beir(data / "ag_news" / "retrieval", EVALUATION_SPLITS)
    pairs = [(beir.get_query_text(i), beir.get_document_text(next(iter(rows)))) for i, rows in enumerate(beir.relevant)]
    return [pair for pair in pairs if len(pair[1].split()) >= 20]


def inject(
    clean: Rows, foreign: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]], rng: np.random.Generator
) -> Rows:
    """Return rows with defects. `kind-N` is the id of a row; `of` names the clean row from which it was made."""
    picks = iter(rng.permutation(len(clean)).tolist())
    makers = {"copy": make_copy, "near": make_near_copy, "html": make_html, "control": make_control}
    trouble = []
    for kind, make in makers.items():
        for number in range(INJECTED):
            row = clean[next(picks)]
            query, positive = make(row["query"], rng), make(row["pos"][0], rng)
            trouble.append({"id": f"{kind}-{number}", "of": row["id"], "query": query, "pos": [positive]})
    for number, index in enumerate(rng.choice(len(foreign), INJECTED, replace=False).tolist()):
        first, second = foreign[index]
        trouble.append({"id": f"foreign-{number}", "query": first, "pos": [second]})
    accented = [pair for pair in foreign if not all(map(str.isascii, pair))]
    for number, index in enumerate(rng.choice(len(accented), INJECTED, replace=False).tolist()):
        wrong = [text.encode().decode("cp1252", "replace") for text in accented[index]]
        if "\ufffd" not in "".join(wrong):  # bytes that the wrong encoding lacks cannot be repaired
            trouble.append({"id": f"mojibake-{number}", "query": wrong[0], "pos": [wrong[1]], "right": accented[index]})
    for number, index in enumerate(rng.choice(len(held_out), 2 * INJECTED, replace=False).tolist()):
        query, document = held_out[index]
        row = {"id": f"leak-{number}", "query": query, "pos": [f"  {document}"]}
        words = document.split()
        for position in range(int(rng.integers(4)), len(words), 6):  # leaves no 13 consecutive words
            words[position] = "moreover"
        near = {"id": f"nearleak-{number}", "query": "What has happened?", "pos": [" ".join(words)]}
        trouble.append(row if number < INJECTED else near)
    for number in range(INJECTED):
        junk = "".join(rng.choice(list("#$%&*|~^=+<>@{}[]a1 "), 60))
        trouble.append({"id": f"junk-{number}", "query": f"x {junk}", "pos": [junk]})
    return trouble


def make_copy(text: str, rng: np.random.Generator) -> str:
    """Change case and white space."""
    return f" {text.upper()}" if rng.random() < 0.5 else text.replace(" ", "  ")


def make_near_copy(text: str, rng: np.random.Generator) -> str:
    """Replace a word of a long text. Short texts do not change."""
    words = text.split()
    if len(words) >= 15:
        words[int(rng.integers(len(words)))] = "moreover"
    return " ".join(words)


def make_html(text: str, rng: np.random.Generator) -> str:
    """Wrap a text in tags, with escaped characters."""
    words = [html.escape(word) for word in text.split()]
    words[int(rng.integers(len(words)))] += "<br/>"
    return f'<div class="a"><p>{" ".join(words)}</p><script>track("x")</script></div>'


def make_control(text: str, rng: np.random.Generator) -> str:
    """Put invisible characters into a text."""
    position = int(rng.integers(1, len(text)))
    return f"{text[:position]}\u200b\x07{text[position:]}"


def run_step(rows: Rows, step: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows that a step keeps, by id."""
    name = f"{len(list(folder.iterdir()))}"
    write_jsonl(folder / f"{name}.jsonl", rows)
    source = {"path": str(folder / f"{name}.jsonl"), "name": "rows"}
    config = CurateConfig.model_validate(
        {"out": str(folder / f"out{name}"), "metadata": ["id"], "sources": [source], "steps": [step]}
    )
    curate(config, make_context(folder / "cache"), "benchmark")
    return {row["id"]: row for row in map(json.loads, (folder / f"out{name}" / "rows.jsonl").read_text().splitlines())}


def score(found: Iterable[str], expected: Iterable[str]) -> tuple[int, int, float, float]:
    """Return the numbers of expected and found ids, precision and recall."""
    found, expected = set(found), set(expected)
    hits = len(found & expected)
    return len(expected), len(found), hits / max(len(found), 1), hits / max(len(expected), 1)


def score_pairs(rows: Rows, left: Iterable[str], kinds: Sequence[str]) -> tuple[int, int, float, float]:
    """Score a step that should drop one of each pair of a clean row and a copy of it."""
    left = set(left)
    pairs = [{row["id"], row["of"]} for row in rows if row["id"].split("-")[0] in kinds]
    dropped = {row["id"] for row in rows} - left
    hits = sum(len(pair & dropped) == 1 for pair in pairs)
    return len(pairs), len(dropped), hits / max(len(dropped), 1), hits / len(pairs)


def ids_of(rows: Rows, *kinds: str) -> set[str]:
    return {row["id"] for row in rows if row["id"].split("-")[0] in kinds}


def same_words(text: str, other: str) -> bool:
    return re.sub(r"\s+", " ", text).strip() == re.sub(r"\s+", " ", other).strip()


def measure(data: Path, max_rows: int, folder: Path) -> Iterable[tuple[str, str, tuple[int, int, float, float]]]:
    """Yield each step, its target, and its score."""
    rng = np.random.default_rng(0)
    clean = read_pairs(data, max_rows)
    rows = clean + inject(clean, read_foreign(data), read_held_out(data), rng)
    rows = [rows[i] for i in rng.permutation(len(rows)).tolist()]
    by_id, all_ids = {row["id"]: row for row in rows}, ids_of(rows, *{row["id"].split("-")[0] for row in rows})

    # Cleaning: a row is found if it is changed, and repaired if it has the words of the clean one.
    settings: list[tuple[str, str]] = [("html", "html"), ("control_chars", "control"), ("repair", "mojibake")]
    for key, kind in settings:
        off = {"unicode": "none", "control_chars": False, "whitespace": False}
        left = run_step(rows, {"name": "clean", **off, key: True}, folder)
        changed = [i for i, row in left.items() if (row["query"], row["pos"]) != (by_id[i]["query"], by_id[i]["pos"])]
        yield f"clean: {key}", f"{kind} (changed)", score(changed, ids_of(rows, kind))
        right = []
        for i in ids_of(rows, kind):
            origin = by_id[i].get("right") or [by_id[by_id[i]["of"]]["query"], by_id[by_id[i]["of"]]["pos"][0]]
            right += [i] if same_words(left[i]["query"], origin[0]) and same_words(left[i]["pos"][0], origin[1]) else []
        yield f"clean: {key}", f"{kind} (as before the damage)", score(right, ids_of(rows, kind))

    left = run_step(rows, {"name": "quality", "max_symbols": 0.3}, folder)
    yield "quality: max_symbols 0.3", "junk", score(all_ids - set(left), ids_of(rows, "junk"))
    left = run_step(rows, {"name": "language", "languages": ["en"]}, folder)
    yield "language: en", "foreign, mojibake", score(all_ids - set(left), ids_of(rows, "foreign", "mojibake"))
    left = run_step(rows, {"name": "duplicates"}, folder)
    yield "duplicates: pairs, exact", "copy", score_pairs(rows, left, ["copy"])
    for threshold in (0.7, 0.8):
        step = {"name": "duplicates", "match": "near", "threshold": threshold}
        left = run_step(rows, step, folder)
        yield (
            f"duplicates: pairs, near, {threshold}",
            "copy, near, control",
            score_pairs(rows, left, ["copy", "near", "control"]),
        )
    yield from measure_decontamination(rows, data, folder)


def measure_decontamination(rows: Rows, data: Path, folder: Path) -> Iterable[tuple[str, str, tuple[int, int, float, float]]]:
    """Yield the scores of `decontaminate` by rule."""
    all_ids = {row["id"] for row in rows}
    rules: list[tuple[str, dict[str, Any]]] = [
        ("equal", {"ngram_words": None}), ("13 words", {}),
        ("BM25 0.5", {"ngram_words": None, "bm25_threshold": 0.5}), ("BM25 0.6", {"ngram_words": None, "bm25_threshold": 0.6}),
        ("BM25 0.7", {"ngram_words": None, "bm25_threshold": 0.7}), ("BM25 0.8", {"ngram_words": None, "bm25_threshold": 0.8}),
    ]  # fmt: skip
    for name, options in rules:
        step = {"name": "decontaminate", "beir": [str(data / "ag_news" / "retrieval")], **options}
        dropped = all_ids - set(run_step(rows, step, folder))
        yield f"decontaminate: {name}", "leak, nearleak", score(dropped, ids_of(rows, "leak", "nearleak"))


def print_table(results: Iterable[tuple[str, str, tuple[int, int, float, float]]]) -> None:
    print("| step | target | injected | found | precision | recall |\n|---|---|---|---|---|---|", flush=True)
    for step, kind, (expected, found, precision, recall) in results:
        print(f"| {step} | {kind} | {expected:,} | {found:,} | {precision:.3f} | {recall:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=5600, help="clean rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print_table(measure(args.data, args.rows, Path(name)))


if __name__ == "__main__":
    main()
