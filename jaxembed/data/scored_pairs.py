"""Scored pairs of sentences: either pairs with at least `min_score` are positives, or all pairs are graded by their scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.filters import add_filters
from jaxembed.data.rows import IndexedRows, RowsAbove, RowSchema
from jaxembed.data.sampling import ExampleSampler
from jaxembed.data.schema import Example, Row, check_label_scored, check_scored, read_label
from jaxembed.errors import UserError

SCORED_PAIR_SCHEMA = RowSchema("scored_pairs", check_scored, lambda row: row["score"])
MAX_DEFAULT_SCORE = 5  # highest score of the scale 0 to 5, which the default of `min_score` assumes
DETECTED_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 5.0))
UNSCORED_LABEL_REASON = "labels without a score in label_scores"
log = logging.getLogger(__name__)


def make_scored_pair_schema(config: SourceConfig) -> RowSchema:
    """Return the schema of a source of scored pairs, with its filters, score range, and label scores."""
    schema = SCORED_PAIR_SCHEMA._replace(check=lambda row: _check_row(row, config))
    if config.label_scores:
        schema = schema._replace(
            index_value=lambda row: _find_label_score(row, config),
            find_drops=lambda row: [UNSCORED_LABEL_REASON] if _find_label_score(row, config) is None else [],
        )
    schema = add_filters(schema, config)  # before the schema is renamed: filters look up its name
    if not config.label_scores and config.score_range is None:
        return schema
    keys = config.model_dump_json(include={"label_scores", "score_range"})
    return schema._replace(name=f"{schema.name} with {keys}")


def _check_row(row: Row, config: SourceConfig) -> str | None:
    """Return what is wrong with a row, or None."""
    if config.label_scores:
        return check_label_scored(row)
    if (problem := check_scored(row)) or config.score_range is None:
        return problem
    low, high = config.score_range
    if low <= row["score"] <= high:
        return None
    return f'"score" is {row["score"]:g} (expected {low:g} to {high:g}, the source\'s score_range)'


def _find_label_score(row: Row, config: SourceConfig) -> float | None:
    """Return the score of the label in the field `score`, or None."""
    label = read_label({"label": row.get("score")})
    return None if label is None else config.label_scores.get(label)


class ScoredPairSampler(ExampleSampler):
    """Draws from (sentence1, sentence2, score) rows with a score of at least `min_score`, in a random direction.

    NV-Embed (section 4.2) makes two examples of each such row, one per direction. Here a row becomes either of them when it
    is drawn. The rows have no hard negatives; NV-Embed mines them.
    """

    max_positives = 1

    def __init__(self, rows: IndexedRows, config: SourceConfig):
        """Find the rows with a score of at least `min_score`.

        Raises:
            UserError: There is none, or the scores do not fit the default of `min_score`.
        """
        self.rows = rows
        self._usable_rows = RowsAbove(rows.index_values, config.min_score)
        self.drop_counts = {**rows.drop_counts, "score below min_score": len(rows) - len(self._usable_rows)}
        self._check_range(config)

    def __len__(self) -> int:
        return len(self._usable_rows)

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw a direction of the row."""
        pair = _read_pair(self.rows[self._usable_rows[index]])
        query, positive = pair if rng.integers(2) else pair[::-1]
        return Example(query=query, positive=positive, negatives=(), positives=(positive,))

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield both directions of the row."""
        yield from _iter_pair_rows(self.rows[self._usable_rows[index]])

    def _check_range(self, config: SourceConfig) -> None:
        """Refuse scores that do not fit `min_score`, and warn if it makes every pair a positive."""
        lowest, highest = _find_limits(self.rows)
        limits = f"the scores go from {lowest:g} to {highest:g}"
        if not len(self):
            raise UserError(
                f"{config.path}: no pair has a score of {config.min_score} or more ({limits}). Lower the source's min_score."
            )
        if highest > MAX_DEFAULT_SCORE and "min_score" not in config.model_fields_set:
            raise UserError(
                f"{config.path}: {limits}, but min_score is {config.min_score}, the default for scores from 0 to "
                f"{MAX_DEFAULT_SCORE}. Set the source's min_score to the lowest score of a positive pair."
            )
        if len(self) == len(self.rows) and lowest < highest:
            log.warning(
                "%s: every pair is a positive, because %s and min_score is %g; raise it if some pairs are not positives",
                config.path, limits, config.min_score,
            )  # fmt: skip


class GradedPairSampler(ExampleSampler):
    """Draws from all (sentence1, sentence2, score) rows, in a random direction, each with its score.

    Attributes:
        score_range: Lowest and highest possible score.
        positive_count: Number of pairs with a score of at least `min_score`. Only these count as positives.
    """

    max_positives = 1

    def __init__(self, rows: IndexedRows, config: SourceConfig):
        """Set the range of the scores: that of the config, or a detected one.

        Raises:
            UserError: The config has no range, and none of `DETECTED_RANGES` contains all scores.
        """
        self.rows, self._min_score = rows, config.min_score
        self.drop_counts = dict(rows.drop_counts)
        self.score_range = config.score_range or _detect_range(rows, config.path)
        self.positive_count = len(RowsAbove(rows.index_values, config.min_score))

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw a direction of the row."""
        pair = _read_pair(self.rows[index])
        query, positive = pair if rng.integers(2) else pair[::-1]
        score = float(self.rows.index_values[index])
        is_positive = score >= self._min_score
        return Example(
            query=query,
            positive=positive,
            negatives=(),
            positives=(positive,) if is_positive else (),
            score=normalize_score(score, self.score_range),
            is_positive=is_positive,
        )

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield both directions of the row, even if the pair is not a positive."""
        yield from _iter_pair_rows(self.rows[index])


def normalize_score(score: float, score_range: Sequence[float]) -> float:
    """Map a score linearly to the scale of cosines: to [0, 1], or to [-1, 1] if the range starts below 0."""
    low, high = score_range
    fraction = (score - low) / (high - low)
    return 2 * fraction - 1 if low < 0 else fraction


def _detect_range(rows: IndexedRows, path: str) -> tuple[float, float]:
    lowest, highest = _find_limits(rows)
    for low, high in DETECTED_RANGES:
        if low <= lowest and highest <= high:
            return low, high
    raise UserError(
        f"{path}: the scores go from {lowest:g} to {highest:g} (expected 0 to 1, -1 to 1, or 0 to 5). "
        "Set the source's score_range to the lowest and the highest possible score."
    )


def _find_limits(rows: IndexedRows) -> tuple[float, float]:
    return float(rows.index_values.min()), rows.max_value


def _read_pair(row: Row) -> tuple[str, str]:
    return row["sentence1"], row["sentence2"]


def _iter_pair_rows(row: Row) -> Iterator[Row]:
    """Yield both directions of a scored pair as rows of pairs."""
    first, second = _read_pair(row)
    yield from ({"query": first, "pos": [second]}, {"query": second, "pos": [first]})
