"""What a training example is, and the checks that rows of files pass before anything is trained on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from jaxembed.config.fields import shown
from jaxembed.config.spec import FewShotExample
from jaxembed.errors import UserError
from jaxembed.files import decode


@dataclasses.dataclass(frozen=True)
class Example:
    """One query as it is drawn for one step.

    `positives` are all texts known to answer the query: they are never its negatives. `score` is a graded similarity
    of query and positive where the source has one, else NaN; `label` a class of the source, else -1. `shots` are in-context
    examples of the query. `teacher_scores` are a teacher's of the positive and of each negative, or none.
    """

    query: str
    positive: str
    negatives: tuple[str, ...]
    positives: tuple[str, ...]
    instruction: str = ""
    shots: tuple[FewShotExample, ...] = ()
    document_instruction: str = ""
    label: int = -1
    score: float = float("nan")
    teacher_scores: tuple[float, ...] = ()


Row = Mapping[str, Any]
RowCheck = Callable[[Row], str | None]  # what is wrong with a row, or None
MISSING = "missing"  # what a check calls a field that is not there
SHOWN = 10  # fields of a row that an error lists
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a surrogate pair, escaped


def check_pair(row: Row) -> str | None:
    """A row of the main format: query, pos and neg, as FlagEmbedding, BGE and KaLM share it."""
    if problem := _text(row, "query"):
        return problem
    for field, required in (("pos", True), ("neg", False)):
        texts = row.get(field, None if required else [])
        if isinstance(texts, str):
            return f'"{field}" is a string; write a list: "{field}": [{json.dumps(texts[:40], ensure_ascii=False)}]'
        if not isinstance(texts, list):
            return _wrong(row, field, "a list of non-empty strings")
        if not all(map(is_text, texts)):
            return f'"{field}" holds {shown(next(t for t in texts if not is_text(t)))}; expected non-empty strings'
        if required and not texts:
            return f'"{field}" is empty; a query needs a positive'
        if (scores := row.get(f"{field}_scores")) is not None and not (
            isinstance(scores, list) and len(scores) == len(texts) and all(map(_is_number, scores))
        ):
            return _wrong(row, f"{field}_scores", f'a list of {len(texts)} finite numbers, one for each of "{field}"')
    if row.get("neg_scores") and row.get("pos_scores") is None:
        return 'has "neg_scores" but no "pos_scores"; a teacher scores both'
    return None if isinstance(row.get("prompt", ""), str) else _wrong(row, "prompt", "a string")


def check_text(row: Row) -> str | None:
    """A text alone."""
    return _text(row, "text")


def check_label(row: Row) -> str | None:
    """A (text, label) row."""
    if problem := _text(row, "text"):
        return problem
    label = row.get("label")
    good = is_text(label) or isinstance(label, int)
    return None if good else _wrong(row, "label", "a non-empty string or a whole number")


def check_scored(row: Row) -> str | None:
    """A (sentence1, sentence2, score) row."""
    if problem := _text(row, "sentence1") or _text(row, "sentence2"):
        return problem
    score = row.get("score")
    return None if _is_number(score) else _wrong(row, "score", "a finite number")


NLI_LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}  # and the numbers; -1: annotators did not agree


def check_nli(row: Row) -> str | None:
    """A (premise, hypothesis, label) row; the texts may be called sentence1 and sentence2."""
    premise, hypothesis = nli_fields(row)
    if problem := _text(row, premise) or _text(row, hypothesis):
        return problem
    label = row.get("label")
    known = isinstance(label, str | int) and not isinstance(label, bool)
    return (
        None
        if known and label in {*NLI_LABELS, *NLI_LABELS.values()}
        else _wrong(row, "label", "entailment, neutral or contradiction, or 0, 1 or 2 (-1: none)")
    )


def nli_fields(row: Row) -> tuple[str, str]:
    """How a row calls its premise and its hypothesis."""
    return ("premise", "hypothesis") if "premise" in row else ("sentence1", "sentence2")


def check_document(row: Row) -> str | None:
    """A row of any fields."""
    return None


def check_passage(row: Row) -> str | None:
    """A text of a corpus, with or without a title."""
    if not isinstance(row.get("title", ""), str):
        return _wrong(row, "title", "a string")
    return None if isinstance(row.get("text"), str) else _wrong(row, "text", "a string")


def check_corpus(row: Row) -> str | None:
    """A document of a BEIR corpus."""
    return check_passage(row) or _text(row, "_id")


def check_query(row: Row) -> str | None:
    """A query of a BEIR folder."""
    return _text(row, "_id") or _text(row, "text")


def check_shot(row: Row) -> str | None:
    """An in-context example."""
    return _text(row, "query") or _text(row, "response")


def is_text(value: Any) -> bool:
    """Whether a value is a string that holds more than white space: what counts as a text everywhere."""
    return isinstance(value, str) and bool(value.strip())


def _text(row: Row, field: str) -> str | None:
    return None if is_text(row.get(field)) else _wrong(row, field, "a non-empty string")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _wrong(row: Row, field: str, expected: str) -> str:
    return f'"{field}" is {shown(row[field]) if field in row else MISSING}; expected {expected}'


def fields_of(row: Row) -> str:
    """The names of a row's fields, the first of them, as an error lists them."""
    return ", ".join([*islice(row, SHOWN), *(["..."] if len(row) > SHOWN else [])]) or "no fields"


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """A JSON object from one line of a file; `where` is file and line, for errors."""
    text = decode(line, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found a {type(row).__name__}")
    if HALF_PAIR.search(line) and not _encodable(row):
        raise UserError(f"{where}: a text holds half of a surrogate pair, such as \\ud83d alone; it is no valid Unicode")
    return row


def _encodable(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def text_hash(text: str) -> np.ndarray:
    """uint32 [2]: 64 bits of BLAKE2 of a text, by which equal texts are recognised across a global batch."""
    return np.frombuffer(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), np.uint32)
