"""Precision and recall of the steps of `jaxembed curate` on real data with injected defects.

Usage: python benchmarks/curation.py DATA [--rows N]

DATA is a folder with ag_news/pairs_train.jsonl, ag_news/retrieval (BEIR) and stsb/{de,fr,pl}/train.jsonl. Rows of AG News
(title -> text) are mixed with rows that a step should find. Each step runs alone on the mixture, those for defects inside
single texts on a mixture of their own.
"""

from __future__ import annotations

import argparse
import html
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curation_scores import TABLE_HEADER, Rows, StepScore, run_steps, score_step
from curation_text_defects import BOILERPLATE_PATTERNS, PERSONAL_PATTERNS, make_rows_with_negatives, make_text_defects
from jsonl_rows import read_rows

from jaxembed.data.beir import EVALUATION_SPLITS, open_beir

ROWS_PER_DEFECT = 200
LANGUAGES = ("de", "fr", "pl")  # of the rows that are not English
MIN_LEAK_WORDS = 20  # of the held-out documents that are injected
TextPairs = Sequence[tuple[str, str]]


def read_pairs(data: Path, max_rows: int) -> Rows:
    """Return the first rows of AG News with the ids clean-0, clean-1, ..."""
    rows = read_rows(data / "ag_news" / "pairs_train.jsonl")[:max_rows]
    return [{"id": f"clean-{i}", "query": row["query"], "pos": row["pos"][:1]} for i, row in enumerate(rows)]


def read_translations(data: Path) -> TextPairs:
    """Return pairs of similar sentences in other languages."""
    rows = [row for language in LANGUAGES for row in read_rows(data / "stsb" / language / "train.jsonl")]
    return [(row["sentence1"], row["sentence2"]) for row in rows if row["score"] >= 4]


def read_held_out(data: Path) -> TextPairs:
    """Return the queries of the held-out BEIR folder with their documents of `MIN_LEAK_WORDS` words or more."""
    beir = open_beir(data / "ag_news" / "retrieval", EVALUATION_SPLITS)
    pairs = [(beir.get_query_text(i), beir.get_document_text(next(iter(rows)))) for i, rows in enumerate(beir.relevant)]
    return [pair for pair in pairs if len(pair[1].split()) >= MIN_LEAK_WORDS]


def make_defects(clean: Rows, translations: TextPairs, held_out: TextPairs, rng: np.random.Generator) -> Rows:
    """Return rows with defects.

    Returns:
        Rows whose ids are the kind of the defect and a number. `of` is the id of the clean row from which a row was made, and
        `original` its texts before the damage.
    """
    # The order of the draws determines the rows.
    edited = edit_clean_rows(clean, rng)
    foreign = make_foreign_rows(translations, rng)
    return [*edited, *foreign, *make_leaks(held_out, rng), *make_junk(rng)]


def edit_clean_rows(clean: Rows, rng: np.random.Generator) -> Rows:
    """Return edited copies of different clean rows, `ROWS_PER_DEFECT` for each way to edit a text."""
    picks = iter(rng.permutation(len(clean)).tolist())
    editors = {"copy": change_case, "near": replace_word, "html": add_html, "control": add_control_characters}
    rows = []
    for kind, edit in editors.items():
        for number in range(ROWS_PER_DEFECT):
            row = clean[next(picks)]
            query, positive = edit(row["query"], rng), edit(row["pos"][0], rng)
            original = (row["query"], row["pos"][0])
            rows.append({"id": f"{kind}-{number}", "of": row["id"], "original": original, "query": query, "pos": [positive]})
    return rows


def make_foreign_rows(translations: TextPairs, rng: np.random.Generator) -> Rows:
    """Return rows in other languages (foreign), and rows that were decoded with the wrong encoding (mojibake)."""
    rows: Rows = []
    for number, index in enumerate(rng.choice(len(translations), ROWS_PER_DEFECT, replace=False).tolist()):
        first, second = translations[index]
        rows.append({"id": f"foreign-{number}", "query": first, "pos": [second]})
    accented = [pair for pair in translations if not all(map(str.isascii, pair))]
    for number, index in enumerate(rng.choice(len(accented), ROWS_PER_DEFECT, replace=False).tolist()):
        first, second = (text.encode().decode("cp1252", "replace") for text in accented[index])
        if "\ufffd" not in first + second:  # bytes that cp1252 lacks cannot be repaired
            rows.append({"id": f"mojibake-{number}", "original": accented[index], "query": first, "pos": [second]})
    return rows


def make_leaks(held_out: TextPairs, rng: np.random.Generator) -> Rows:
    """Return rows with held-out texts (leak), and rows with held-out documents without 13 equal words in a row (nearleak)."""
    rows = []
    for number, index in enumerate(rng.choice(len(held_out), 2 * ROWS_PER_DEFECT, replace=False).tolist()):
        query, document = held_out[index]
        words = document.split()
        for position in range(int(rng.integers(4)), len(words), 6):
            words[position] = "moreover"
        if number < ROWS_PER_DEFECT:
            rows.append({"id": f"leak-{number}", "query": query, "pos": [f"  {document}"]})
        else:
            rows.append({"id": f"nearleak-{number}", "query": "What has happened?", "pos": [" ".join(words)]})
    return rows


def make_junk(rng: np.random.Generator) -> Rows:
    """Return rows of random symbols."""
    texts = ["".join(rng.choice(list("#$%&*|~^=+<>@{}[]a1 "), 60)) for _ in range(ROWS_PER_DEFECT)]
    return [{"id": f"junk-{number}", "query": f"x {text}", "pos": [text]} for number, text in enumerate(texts)]


def change_case(text: str, rng: np.random.Generator) -> str:
    """Change case or white space."""
    return f" {text.upper()}" if rng.random() < 0.5 else text.replace(" ", "  ")


def replace_word(text: str, rng: np.random.Generator) -> str:
    """Replace a word of a long text. Short texts do not change."""
    words = text.split()
    if len(words) >= 15:
        words[int(rng.integers(len(words)))] = "moreover"
    return " ".join(words)


def add_html(text: str, rng: np.random.Generator) -> str:
    """Wrap a text in tags, with escaped characters."""
    words = [html.escape(word) for word in text.split()]
    words[int(rng.integers(len(words)))] += "<br/>"
    return f'<div class="a"><p>{" ".join(words)}</p><script>track("x")</script></div>'


def add_control_characters(text: str, rng: np.random.Generator) -> str:
    """Put invisible characters into a text."""
    position = int(rng.integers(1, len(text)))
    return f"{text[:position]}\u200b\x07{text[position:]}"


def score_copies(step: str, rows: Rows, remaining: Iterable[str], kinds: Sequence[str]) -> StepScore:
    """Score a step that should drop one of each pair of a clean row and a copy of it.

    Args:
        step: The step with its settings.
        rows: All rows.
        remaining: Ids of the rows that the step keeps.
        kinds: Kinds of copies.
    """
    pairs = [{row["id"], row["of"]} for row in rows if get_kind(row) in kinds]
    dropped = {row["id"] for row in rows} - set(remaining)
    hits = sum(len(pair & dropped) == 1 for pair in pairs)
    return StepScore(step, ", ".join(kinds), len(pairs), len(dropped), hits)


def get_kind(row: dict[str, Any]) -> str:
    """Return the kind of a row: clean, or that of its defect."""
    return str(row["id"]).split("-")[0]


def list_ids(rows: Rows, *kinds: str) -> set[str]:
    """Return the ids of the rows of some kinds."""
    return {row["id"] for row in rows if get_kind(row) in kinds}


def has_same_words(text: str, other: str) -> bool:
    """Return whether two texts differ at most in white space."""
    return re.sub(r"\s+", " ", text).strip() == re.sub(r"\s+", " ", other).strip()


def measure(data: Path, max_rows: int, folder: Path) -> Iterator[StepScore]:
    """Yield the score of every step."""
    rng = np.random.default_rng(0)
    clean = read_pairs(data, max_rows)
    rows = clean + make_defects(clean, read_translations(data), read_held_out(data), rng)
    rows = [rows[i] for i in rng.permutation(len(rows)).tolist()]
    yield from measure_cleaning(rows, folder)
    yield from measure_filters(rows, folder)
    yield from measure_duplicates(rows, folder)
    yield from measure_decontamination(rows, data, folder)
    yield from measure_text_defects(clean, read_translations(data), folder)
    yield from measure_negatives(clean, folder)


def run_step(rows: Rows, step: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows that a step keeps, by id."""
    return run_steps(rows, [step], folder, folder / "cache")


def measure_cleaning(rows: Rows, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of each key of `clean` alone: by the rows that it changes, and by those that it repairs."""
    for key, kind in (("html", "html"), ("control_chars", "control"), ("repair", "mojibake")):
        yield from measure_cleaning_key(rows, key, True, kind, folder)


def measure_cleaning_key(rows: Rows, key: str, value: Any, kind: str, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of a key of `clean` alone, for the defects of a kind."""
    rows_by_id = {row["id"]: row for row in rows}
    off = {"unicode": "none", "control_chars": False, "whitespace": False}
    cleaned = run_step(rows, {"name": "clean", **off, key: value}, folder)
    changed = [i for i, row in cleaned.items() if any(row[field] != rows_by_id[i][field] for field in ("query", "pos"))]
    repaired = [i for i in list_ids(rows, kind) if is_repaired(cleaned[i], rows_by_id[i]["original"])]
    yield score_step(f"clean: {key}", f"{kind} (changed)", changed, list_ids(rows, kind))
    yield score_step(f"clean: {key}", f"{kind} (as before the damage)", repaired, list_ids(rows, kind))


def is_repaired(row: dict[str, Any], original: tuple[str, str]) -> bool:
    """Return whether a row has the words that it had before the damage."""
    return all(map(has_same_words, (row["query"], row["pos"][0]), original))


def measure_filters(rows: Rows, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of `quality` and `language`."""
    all_ids = {row["id"] for row in rows}
    remaining = run_step(rows, {"name": "quality", "max_symbols": 0.3}, folder)
    yield score_step("quality: max_symbols 0.3", "junk", all_ids - set(remaining), list_ids(rows, "junk"))
    remaining = run_step(rows, {"name": "language", "languages": ["en"]}, folder)
    expected = list_ids(rows, "foreign", "mojibake")
    yield score_step("language: en", "foreign, mojibake", all_ids - set(remaining), expected)


def measure_duplicates(rows: Rows, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of `duplicates` for exact copies, and for near copies by threshold."""
    remaining = run_step(rows, {"name": "duplicates"}, folder)
    yield score_copies("duplicates: pairs, exact", rows, remaining, ["copy"])
    for threshold in (0.7, 0.8):
        remaining = run_step(rows, {"name": "duplicates", "match": "near", "threshold": threshold}, folder)
        yield score_copies(f"duplicates: pairs, near, {threshold}", rows, remaining, ["copy", "near", "control"])


def measure_decontamination(rows: Rows, data: Path, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of `decontaminate` by rule."""
    all_ids = {row["id"] for row in rows}
    rules: list[tuple[str, dict[str, Any]]] = [("equal", {"ngram_words": None}), ("13 words", {})]
    rules += [(f"BM25 {threshold}", {"ngram_words": None, "bm25_threshold": threshold}) for threshold in (0.5, 0.6, 0.7, 0.8)]
    for name, options in rules:
        step = {"name": "decontaminate", "beir": [str(data / "ag_news" / "retrieval")], **options}
        dropped = all_ids - set(run_step(rows, step, folder))
        yield score_step(f"decontaminate: {name}", "leak, nearleak", dropped, list_ids(rows, "leak", "nearleak"))


def measure_text_defects(clean: Rows, translations: TextPairs, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of steps on rows with defects inside single texts."""
    rng = np.random.default_rng(1)
    accented = [pair for pair in translations if not all(map(str.isascii, pair))]
    rows = clean + make_text_defects(clean, accented, rng)
    rows = [rows[i] for i in rng.permutation(len(rows)).tolist()]
    yield from measure_cleaning_key(rows, "unicode", "NFC", "decomposed", folder)
    yield from measure_cleaning_key(rows, "boilerplate", BOILERPLATE_PATTERNS, "boilerplate", folder)
    all_ids = {row["id"] for row in rows}
    filters = {"rules": ["gopher_repetition"], "drop_patterns": PERSONAL_PATTERNS}
    for (key, value), kind in zip(filters.items(), ("repetition", "personal"), strict=True):
        remaining = run_step(rows, {"name": "quality", "sides": ["positives"], key: value}, folder)
        yield score_step(f"quality: {key}", kind, all_ids - set(remaining), list_ids(rows, kind))


def measure_negatives(clean: Rows, folder: Path) -> Iterator[StepScore]:
    """Yield the scores of `negatives`, by the negatives that it drops."""
    rows, false = make_rows_with_negatives(clean, np.random.default_rng(2))
    for name, options, kinds in (("", {}, ("copy",)), (": answer_field", {"answer_field": "answer"}, ("copy", "answer"))):
        remaining = run_step(rows, {"name": "negatives", **options}, folder)
        dropped = [f"{row['id']} {text}" for row in rows for text in row["neg"] if text not in remaining[row["id"]]["neg"]]
        yield score_step(f"negatives{name}", ", ".join(kinds), dropped, set[str]().union(*(false[kind] for kind in kinds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the data sets")
    parser.add_argument("--rows", type=int, default=5600, help="clean rows (default: %(default)s)")
    args = parser.parse_args()
    print(TABLE_HEADER, flush=True)
    with tempfile.TemporaryDirectory() as name:
        for score in measure(args.data, args.rows, Path(name)):
            print(score.format_row(), flush=True)


if __name__ == "__main__":
    main()
