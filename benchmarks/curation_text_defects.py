"""Rows with defects inside single texts, for the steps of `jaxembed curate` that `curation.py` measures on them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from curation_scores import Rows

ROWS_PER_DEFECT = 200
NEGATIVES_PER_ROW = 4
BOILERPLATE_LINES = (
    "Share on Facebook", "Share on Twitter", "Click here to subscribe", "Copyright 2004 The News. All rights reserved.",
    "Read more...", "Advertisement",
)  # fmt: skip
# What a user could write after a look at some rows. Not every line and number above and below has the expected form.
BOILERPLATE_PATTERNS = (r"Share on \w+", r"(?i)click here .*", r"(?i).*all rights reserved\.?", r"Read more(\.\.\.)?")
PERSONAL_PATTERNS = (r"\b[\w.+-]+@[\w-]+\.\w+", r"\b\d{3}[-. ]\d{3}[-. ]\d{4}\b", r"\b\d{3}-\d{2}-\d{4}\b")


def make_text_defects(clean: Rows, accented: Sequence[tuple[str, str]], rng: np.random.Generator) -> Rows:
    """Return rows whose ids are the kind of the defect and a number, `ROWS_PER_DEFECT` of each kind.

    Args:
        clean: Rows to copy.
        accented: Pairs of texts with accents.
        rng: Draws the rows and the defects.
    """
    picks = iter(rng.permutation(len(clean)).tolist())
    editors: dict[str, Callable[[str, np.random.Generator], str]] = {
        "boilerplate": add_boilerplate, "repetition": repeat_words, "personal": add_personal_data,
    }  # fmt: skip
    rows: Rows = []
    for kind, edit in editors.items():
        for number in range(ROWS_PER_DEFECT):
            row = clean[next(picks)]
            original = (row["query"], row["pos"][0])
            rows.append({"id": f"{kind}-{number}", "original": original, "query": original[0], "pos": [edit(original[1], rng)]})
    for number, index in enumerate(rng.choice(len(accented), ROWS_PER_DEFECT, replace=False).tolist()):
        original = (unicodedata.normalize("NFC", accented[index][0]), unicodedata.normalize("NFC", accented[index][1]))
        first, second = (unicodedata.normalize("NFD", text) for text in original)
        rows.append({"id": f"decomposed-{number}", "original": original, "query": first, "pos": [second]})
    return rows


def add_boilerplate(text: str, rng: np.random.Generator) -> str:
    """Put a line of a web page above or below a text."""
    line = str(rng.choice(BOILERPLATE_LINES))
    return f"{text}\n{line}" if rng.random() < 0.7 else f"{line}\n{text}"


def repeat_words(text: str, rng: np.random.Generator) -> str:
    """Repeat a run of words of a text, 4 to 10 times."""
    words = text.split()
    start, size = int(rng.integers(max(len(words) - 8, 1))), int(rng.integers(2, 9))
    return " ".join([*words[:start], *words[start : start + size] * int(rng.integers(4, 11)), *words[start + size :]])


def add_personal_data(text: str, rng: np.random.Generator) -> str:
    """Insert an e-mail address, a telephone number in one of several notations, or a social security number."""
    digits = "".join(map(str, rng.integers(10, size=10)))
    area, prefix, line = digits[:3], digits[3:6], digits[6:]
    values = [
        f"jo.{digits}@mail.example.org", f"{area}-{prefix}-{line}", f"{area}.{prefix}.{line}", f"({area}) {prefix}-{line}",
        f"+1 {area} {prefix} {line}", f"{area}-{digits[3:5]}-{line}",
    ]  # fmt: skip
    words = text.split()
    words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(values)))
    return " ".join(words)


def make_rows_with_negatives(clean: Rows, rng: np.random.Generator) -> tuple[Rows, dict[str, set[str]]]:
    """Return rows with an answer and negatives, and the false negatives among them by kind.

    The negatives are the positives of other rows. In the first row, one is a copy of the positive, the query, or another
    negative in other case (`copy`). In the second, the answer is put into one (`answer`), and so on. A negative is identified
    by the id of its row and the text.

    Args:
        clean: Rows to copy.
        rng: Draws the negatives.
    """
    rows: Rows = []
    false: dict[str, set[str]] = {"copy": set(), "answer": set()}
    for number, index in enumerate(rng.permutation(len(clean))[: 2 * ROWS_PER_DEFECT].tolist()):
        row: dict[str, Any] = dict(clean[index], id=f"negatives-{number}", answer=draw_answer(clean[index]["pos"][0], rng))
        negatives = [clean[i]["pos"][0] for i in rng.choice(len(clean), NEGATIVES_PER_ROW, replace=False).tolist()]
        kind = ("copy", "answer")[number % 2]
        if kind == "copy":
            negatives.append(f" {str(rng.choice([row['query'], row['pos'][0], negatives[0]])).upper()} ")
        else:
            negatives[-1] = insert_answer(negatives[-1], row["answer"], rng)
        false[kind].add(f"{row['id']} {negatives[-1]}")
        rows.append(row | {"neg": negatives})
    return rows, false


def draw_answer(text: str, rng: np.random.Generator) -> str:
    """Draw two consecutive words of a text, without signs at their ends."""
    words = text.split()
    start = int(rng.integers(max(len(words) - 1, 1)))
    return " ".join(words[start : start + 2]).strip(".,;:!?()'\"-")


def insert_answer(text: str, answer: str, rng: np.random.Generator) -> str:
    """Put an answer into a text, as it is, in capitals, or before a comma."""
    words = text.split()
    words.insert(int(rng.integers(len(words) + 1)), str(rng.choice([answer, answer.upper(), f"{answer},"])))
    return " ".join(words)
