"""Divide pairs into training rows and a held-out BEIR folder. No document is a positive of both."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.data.beir import join_title_and_text, write_beir
from jaxembed.data.columns import build_row
from jaxembed.data.containers import open_container
from jaxembed.data.equality import hash_text
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.schema import Row, check_pair, check_passage
from jaxembed.data.scratch import move_into_place, open_scratch_folder
from jaxembed.errors import UserError

TRAIN_FILE, HELDOUT_FOLDER = "train.jsonl", "heldout"


def split_pairs(pairs: str, out: Path, share: float, documents: str = "") -> dict[str, int]:
    """Write OUT/train.jsonl and the BEIR folder OUT/heldout from rows of pairs.

    The hash of the first positive decides: the lowest `share` of all hashes is for evaluation, with all rows that have a
    positive in common with such a row. So rows with a common positive stay together, and later rows only move rows with which
    they have one. The corpus has the positives of all rows, and the documents: with their titles if the positives have them,
    otherwise their texts alone.

    Args:
        pairs: File of rows with query and pos.
        out: A new folder.
        share: Expected share of the positives for evaluation, between 0 and 1. Rows with common positives raise it.
        documents: File of further documents of the corpus: rows with `text`, and `title` if they have one.

    Returns:
        The number of training rows, held-out queries and documents of the corpus.

    Raises:
        UserError: A row is bad, or one of the two parts is empty.
    """
    rows = _read_rows(pairs, check_pair)
    indices = _find_heldout_rows([row["pos"] for row in rows], share)
    heldout = [row for i, row in enumerate(rows) if i in indices]
    train = [row for i, row in enumerate(rows) if i not in indices]
    if not heldout or not train:
        raise UserError(
            f"{pairs}: {len(train)} rows to train on and {len(heldout)} held out (expected {share:.0%}). Change the percentage."
        )
    positives = dict.fromkeys(text for row in rows for text in row["pos"])
    texts = _list_texts(_read_rows(documents, check_passage), positives) if documents else []
    ids = {text: f"d{i}" for i, text in enumerate(dict.fromkeys([*texts, *positives]))}
    relevant = {f"q{i}": {ids[text]: 1 for text in row["pos"]} for i, row in enumerate(heldout)}
    queries = {f"q{i}": row["query"] for i, row in enumerate(heldout)}
    with open_scratch_folder(out) as scratch:
        folder = scratch / "split"
        write_beir(folder / HELDOUT_FOLDER, {id_: text for text, id_ in ids.items()}, queries, relevant)
        write_jsonl(folder / TRAIN_FILE, train)
        move_into_place(folder, out)
    return {"train": len(train), "heldout": len(heldout), "documents": len(ids)}


def _read_rows(path: str, check: Callable[[Row], str | None]) -> list[dict[str, Any]]:
    rows = []
    for _, where, content in open_container(path).scan():
        row = build_row(content, where, {})
        if problem := check(row):
            raise UserError(f"{where}: {problem}")
        rows.append(row)
    return rows


def _list_texts(documents: Sequence[Row], positives: Container[str]) -> list[str]:
    """Return the texts of documents in the form of the positives. A document and its positive must not occur as two texts."""
    joined = [join_title_and_text(document) for document in documents]
    has_titles = any(
        text in positives and document["text"] not in positives for text, document in zip(joined, documents, strict=True)
    )
    return joined if has_titles else [document["text"] for document in documents]


def _find_heldout_rows(positives: Sequence[Sequence[str]], share: float) -> set[int]:
    """Return the indices of the rows to hold out."""
    rows_by_positive: dict[str, list[int]] = {}
    for i, texts in enumerate(positives):
        for text in texts:
            rows_by_positive.setdefault(text, []).append(i)
    heldout = {i for i, texts in enumerate(positives) if int(hash_text(texts[0]).view(np.uint64)[0]) < share * 2**64}
    # Follow shared positives from row to row.
    pending = list(heldout)
    while pending:
        neighbors = {i for text in positives[pending.pop()] for i in rows_by_positive[text]} - heldout
        heldout |= neighbors
        pending += neighbors
    return heldout
