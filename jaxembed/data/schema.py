"""The training example, and the checks that every row passes before training uses it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from jaxembed.config.fields import quote_value
from jaxembed.config.spec import FewShotExample
from jaxembed.data.equality import exclude_equal
from jaxembed.errors import UserError
from jaxembed.files import decode


@dataclasses.dataclass(frozen=True)
class Example:
    """One query with its documents, as drawn for one training step.

    Attributes:
        query: The text of the query.
        positive: The document that answers the query in this step.
        negatives: Hard negatives of the query.
        positives: All texts known to answer the query. They are never used as its negatives.
        instruction: Instruction of the query, '' for none.
        few_shot: In-context examples that precede the query.
        document_instruction: Instruction of the documents, '' for none.
        label: Class of the query within its source, -1 for none.
        teacher_scores: A teacher's scores of the positive and of each negative, or empty.
        score: Similarity of query and positive, on the scale of cosines, NaN for none.
        is_positive: Whether the positive answers the query. That of a graded pair may not: it is then only a pair with a score.
    """

    query: str
    positive: str
    negatives: tuple[str, ...]
    positives: tuple[str, ...]
    instruction: str = ""
    few_shot: tuple[FewShotExample, ...] = ()
    document_instruction: str = ""
    label: int = -1
    teacher_scores: tuple[float, ...] = ()
    score: float = math.nan
    is_positive: bool = True


Row = Mapping[str, Any]
RowCheck = Callable[[Row], str | None]  # returns what is wrong with a row, or None
NUMBER_FIELDS = ("score", "pos_scores", "neg_scores")  # fields that are numbers, or lists of numbers
MISSING_FIELD = "missing"  # how a check describes an absent field
MAX_LISTED_FIELDS = 10
MAX_SUGGESTED_CHARS = 40  # characters of a value that an error repeats in its correct form
MAX_ABS_NUMBER = 1e30  # larger numbers count as infinite
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")  # the JSON escape of one half of a surrogate pair


def check_pair(row: Row) -> str | None:
    """Check a row of pairs: query, pos and neg, as in the training files of FlagEmbedding, BGE and KaLM."""
    if problem := check_text_field(row, "query"):
        return problem
    for field, is_required in (("pos", True), ("neg", False)):
        if problem := _check_text_list(row, field, is_required) or _check_teacher_scores(row, field):
            return problem
    if row.get("neg_scores") and row.get("pos_scores") is None:
        return '"neg_scores" is present without "pos_scores" (expected teacher scores for both)'
    return None if isinstance(row.get("prompt", ""), str) else _describe_field_problem(row, "prompt", "a string")


def find_pair_drops(row: Row) -> list[str]:
    """Return a reason for each negative of a pair row that is never drawn."""
    negatives = row.get("neg")
    distinct_negatives = exclude_equal(negatives, (row["query"], *row["pos"])) if negatives else ()
    return ["negatives equal to the query, to a positive or to each other"] * (len(negatives or ()) - len(distinct_negatives))


def _check_text_list(row: Row, field: str, is_required: bool) -> str | None:
    texts = row.get(field, None if is_required else [])
    if isinstance(texts, str):
        suggestion = json.dumps(texts[:MAX_SUGGESTED_CHARS], ensure_ascii=False)
        return f'"{field}" is a string (expected a list of strings). Write "{field}": [{suggestion}].'
    if not isinstance(texts, list):
        return _describe_field_problem(row, field, "a list of non-empty strings")
    if not all(map(is_text, texts)):
        return f'"{field}" contains {quote_value(next(t for t in texts if not is_text(t)))} (expected non-empty strings)'
    return f'"{field}" is empty (expected at least one positive)' if is_required and not texts else None


def _check_teacher_scores(row: Row, field: str) -> str | None:
    """Check the teacher's scores of the texts in `field`, which is a valid list."""
    scores, count = row.get(f"{field}_scores"), len(row.get(field, ()))
    if scores is None or (isinstance(scores, list) and len(scores) == count and all(map(_is_finite_number, scores))):
        return None
    return _describe_field_problem(row, f"{field}_scores", f'a list of {count} finite numbers, one for each text of "{field}"')


def check_text(row: Row) -> str | None:
    """Check a row that holds a single text."""
    return check_text_field(row, "text")


def check_label(row: Row) -> str | None:
    """Check a (text, label) row."""
    return check_text_field(row, "text") or _check_label_field(row, "label")


def _check_label_field(row: Row, field: str) -> str | None:
    label = row.get(field)
    if label is None or is_text(label) or isinstance(label, int) or _is_class_number(label):
        return None
    return _describe_field_problem(row, field, "a non-empty string or an integer")


def _is_class_number(label: Any) -> bool:
    """Return whether a label is an integer as pandas writes it in a column with gaps: a float, and NaN for a gap."""
    return isinstance(label, float) and (math.isnan(label) or label.is_integer())


def read_label(row: Row) -> str | None:
    """Return the label name of a checked row, or None if it has none."""
    label = row.get("label")
    if label is None or label != label:  # NaN
        return None
    return str(int(label)) if isinstance(label, float) else str(label)


NO_LABEL_REASON = "rows without a label"


def find_label_drops(row: Row) -> list[str]:
    """Return a reason if a (text, label) row is left out."""
    return [NO_LABEL_REASON] if read_label(row) is None else []


def check_scored(row: Row) -> str | None:
    """Check a (sentence1, sentence2, score) row."""
    if problem := _check_sentences(row):
        return problem
    return None if _is_finite_number(row.get("score")) else _describe_field_problem(row, "score", "a finite number")


def check_label_scored(row: Row) -> str | None:
    """Check a (sentence1, sentence2, score) row whose score is a label."""
    return _check_sentences(row) or _check_label_field(row, "score")


def _check_sentences(row: Row) -> str | None:
    return check_text_field(row, "sentence1") or check_text_field(row, "sentence2")


NLI_LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}  # -1: the annotators did not agree


def check_nli(row: Row) -> str | None:
    """Check a (premise, hypothesis, label) row. The texts may be named sentence1 and sentence2 instead."""
    premise, hypothesis = get_nli_fields(row)
    if problem := check_text_field(row, premise) or check_text_field(row, hypothesis):
        return problem
    label = row.get("label", NLI_LABELS["-"])
    if isinstance(label, str | int) and not isinstance(label, bool) and label in {*NLI_LABELS, *NLI_LABELS.values()}:
        return None
    return _describe_field_problem(row, "label", "entailment, neutral or contradiction, or 0, 1 or 2 (-1: no label)")


def get_nli_fields(row: Row) -> tuple[str, str]:
    """Return the names of the fields that hold the premise and the hypothesis of an NLI row."""
    return ("sentence1", "sentence2") if "sentence1" in row and "premise" not in row else ("premise", "hypothesis")


def check_document(row: Row) -> str | None:
    """Accept a row with any fields."""
    return None


def check_passage(row: Row) -> str | None:
    """Check a text of a corpus, with or without a title."""
    if not isinstance(row.get("title", ""), str):
        return _describe_field_problem(row, "title", "a string")
    return None if isinstance(row.get("text"), str) else _describe_field_problem(row, "text", "a string")


def check_beir_document(row: Row) -> str | None:
    """Check a document of a BEIR corpus."""
    return check_passage(row) or check_text_field(row, "_id")


def check_beir_query(row: Row) -> str | None:
    """Check a query of a BEIR folder."""
    return check_text_field(row, "_id") or check_text_field(row, "text")


def check_few_shot_example(row: Row) -> str | None:
    """Check an in-context example."""
    return check_text_field(row, "query") or check_text_field(row, "response")


def is_text(value: Any) -> bool:
    """Return whether a value is a string with more than white space. Only such a value counts as a text."""
    return isinstance(value, str) and bool(value.strip())


def check_text_field(row: Row, field: str) -> str | None:
    """Check that a field of a row is a text."""
    return None if is_text(row.get(field)) else _describe_field_problem(row, field, "a non-empty string")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ABS_NUMBER


def _describe_field_problem(row: Row, field: str, expected: str) -> str:
    return f'"{field}" is {quote_value(row[field]) if field in row else MISSING_FIELD} (expected {expected})'


def list_fields(row: Row) -> str:
    """Return the field names of a row for an error, at most `MAX_LISTED_FIELDS` of them."""
    return ", ".join([*islice(row, MAX_LISTED_FIELDS), *(["..."] if len(row) > MAX_LISTED_FIELDS else [])]) or "no fields"


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in one line of a file.

    Args:
        line: The bytes of the line.
        where: File and line, for errors.

    Raises:
        UserError: The line is not UTF-8, not a JSON object, or contains a lone surrogate.
    """
    text = decode(line, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}; expected one object per line)") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object (found a {type(row).__name__})")
    if SURROGATE_ESCAPE.search(line) and not _is_encodable(row):
        raise UserError(f"{where}: not valid Unicode: a text has a lone surrogate, such as \\ud83d")
    return row


def _is_encodable(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
