"""The step `negatives`: drops false negatives of pairs, and those beyond `max_negatives`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxembed.config.curation import NegativesStepConfig
from jaxembed.curation.overlap import split_words
from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, StepOutcome, drop_texts, get_texts
from jaxembed.data.equality import normalize_text

DUPLICATE_NEGATIVE, CONTAINS_ANSWER, SURPLUS_NEGATIVE = (
    "equal to the query, a positive or another negative",
    "contains the answer",
    "beyond max_negatives",
)
TOO_FEW_NEGATIVES = "fewer than min_negatives"


def make_negatives_step(config: NegativesStepConfig) -> RowStep:
    """Return the step. It only changes rows of pairs."""

    def check(rows: Sequence[CuratedRow]) -> list[StepOutcome]:
        return [check_row(row) if row.format == "pairs" else StepOutcome(row.fields) for row in rows]

    def check_row(curated: CuratedRow) -> StepOutcome:
        problems = find_negative_problems(curated, config)
        if problems.count(None) < config.min_negatives:
            return StepOutcome(None, (f"negatives: {TOO_FEW_NEGATIVES}",))
        return drop_texts(curated, {"negatives": problems})

    return check


def find_negative_problems(curated: CuratedRow, config: NegativesStepConfig) -> list[str | None]:
    """Return why each negative of a row is dropped, or None."""
    answers = [words for answer in list_answers(curated.fields.get(config.answer_field)) if (words := split_words(answer))]
    seen = {normalize_text(text) for side in ("query", "positives") for text in get_texts(curated, side)}
    problems: list[str | None] = []
    for negative in get_texts(curated, "negatives"):
        normalized = normalize_text(negative)
        if normalized in seen:
            problems.append(DUPLICATE_NEGATIVE)
        elif answers and contains_any(split_words(negative), answers):
            problems.append(CONTAINS_ANSWER)
        elif config.max_negatives is not None and problems.count(None) >= config.max_negatives:
            problems.append(SURPLUS_NEGATIVE)
        else:
            problems.append(None)
        seen.add(normalized)
    return problems


def list_answers(value: Any) -> list[str]:
    """Return the answers in a field: a text or number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [str(entry) for entry in values if isinstance(entry, str | int | float)]


def contains_any(words: Sequence[str], answers: Sequence[Sequence[str]]) -> bool:
    """Return whether `words` contain one of the answers as a run of words (DPR, Karpukhin et al. 2020, arXiv:2004.04906)."""
    return any(
        list(answer) == list(words[start : start + len(answer)])
        for answer in answers
        for start in range(len(words) - len(answer) + 1)
    )
