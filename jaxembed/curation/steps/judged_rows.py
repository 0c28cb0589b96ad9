"""The step `judge`: a model scores the documents of pairs. The scores are written, and documents are dropped by score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxembed.config.curation_models import JudgeStepConfig
from jaxembed.curation.mining import MAX_MINED_TEXT_CHARS
from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, StepOutcome, drop_texts, get_texts
from jaxembed.hub.cross_encoder import ScorePairs

LOW_POSITIVE, HIGH_NEGATIVE = "scored below min_positive", "scored above max_negative"
NEGATIVE_NEAR_POSITIVE = "scored too near a positive"


def make_judge_step(config: JudgeStepConfig, open_scorer: Callable[[], ScorePairs]) -> RowStep:
    """Return the step. It only changes rows of pairs.

    Args:
        config: The section of the step.
        open_scorer: Opens the judge. Called with the first pairs.
    """

    def judge(rows: Sequence[CuratedRow]) -> list[StepOutcome]:
        pair_rows = [row for row in rows if row.format == "pairs"]
        texts = [get_texts(row, side) for row in pair_rows for side in ("positives", "negatives")]
        queries = [row.fields["query"] for row in pair_rows for _ in range(2)]
        pairs = [(query, text) for query, side in zip(queries, texts, strict=True) for text in side]
        scores = iter(score(pairs).tolist())
        parts = iter([[next(scores) for _ in side] for side in texts])
        return [
            apply_scores(row, next(parts), next(parts), config) if row.format == "pairs" else StepOutcome(row.fields)
            for row in rows
        ]

    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        if not pairs:
            return np.zeros(0)
        truncated = [(query[:MAX_MINED_TEXT_CHARS], text[:MAX_MINED_TEXT_CHARS]) for query, text in pairs]
        return np.round(open_scorer()(truncated).astype(float), 6)

    return judge


def apply_scores(
    curated: CuratedRow, positive_scores: list[float], negative_scores: list[float], config: JudgeStepConfig
) -> StepOutcome:
    """Write the scores of a row, and drop documents by score."""
    row = {**curated.fields, "pos_scores": positive_scores}
    if negative_scores:
        row["neg_scores"] = negative_scores
    limit = config.min_positive
    positives = [LOW_POSITIVE if limit is not None and score < limit else None for score in positive_scores]
    lowest = min((score for score, problem in zip(positive_scores, positives, strict=True) if problem is None), default=0.0)
    negatives = [find_negative_problem(score, lowest, config) for score in negative_scores]
    return drop_texts(curated._replace(fields=row), {"positives": positives, "negatives": negatives})


def find_negative_problem(score: float, lowest_positive: float, config: JudgeStepConfig) -> str | None:
    """Return why a negative is dropped, or None."""
    if config.max_negative is not None and score > config.max_negative:
        return HIGH_NEGATIVE
    is_near = config.negative_margin is not None and score > lowest_positive - config.negative_margin
    return NEGATIVE_NEAR_POSITIVE if is_near else None
