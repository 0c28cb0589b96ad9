"""Bootstrap standard errors of scores, and the paired bootstrap for the difference between two models.

Items are the queries of a retrieval set, the pairs of a similarity set, or the texts of a labeled set. A resample draws
that many items with replacement (Efron and Tibshirani 1993). The paired bootstrap draws the same items for both models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000
STANDARD_ERROR_RESAMPLES = 200  # enough for a standard error (Efron and Tibshirani 1993, section 6.4)
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0
MAX_DRAWN_ITEMS = 2**21  # item indices that one block of resamples holds in memory

# (values of the items [N, C], indices of the items in each resample [R, N]) -> the score of each resample [R]
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ScoredItems:
    """The items that a score is computed from.

    Attributes:
        values: The values of each item, float64 [N, C].
        statistic: Computes the score of any resample of the items.
        unit: What an item is, in the plural.
    """

    values: Float[np.ndarray, "n c"]
    statistic: Statistic
    unit: str

    @property
    def score(self) -> float:
        """The score of all items."""
        return float(self.statistic(self.values, np.arange(len(self.values))[None])[0])


def score_mean(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the mean of the first value over the items of each resample."""
    return values[:, 0][indices].mean(axis=1)


def score_equal_share(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the share of items whose first two values are equal, in each resample."""
    return (values[:, 0] == values[:, 1])[indices].mean(axis=1)


def score_spearman(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return Spearman's correlation of the first two values over the items of each resample."""
    from scipy.stats import rankdata  # takes a second to import

    return _correlate(rankdata(values[:, 0][indices], axis=1), rankdata(values[:, 1][indices], axis=1))


def score_pearson(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return Pearson's correlation of the first two values over the items of each resample."""
    return _correlate(values[:, 0][indices], values[:, 1][indices])


def score_average_precision(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the average precision over the items of each resample, as scikit-learn defines it.

    Args:
        values: The similarity of each pair, and its label: 1 for a positive pair, otherwise 0.
        indices: The pairs of each resample.
    """
    # Number the thresholds from the highest similarity down. Items with equal similarities share one.
    order = np.argsort(-values[:, 0], kind="stable")
    sorted_thresholds = np.cumsum(np.append(0, np.diff(values[order, 0]) != 0))
    thresholds = np.empty(len(order), np.int64)
    thresholds[order] = sorted_thresholds
    threshold_count = int(sorted_thresholds[-1]) + 1
    # Sum the precision at each threshold times the share of the positives that are reached there.
    totals, positives = (count_codes(thresholds, indices, threshold_count, weights) for weights in (None, values[:, 1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.cumsum(positives, axis=1) / np.cumsum(totals, axis=1)
        return np.nansum(precision * positives, axis=1) / positives.sum(axis=1)


def score_weighted_f1(values: Float[np.ndarray, "n c"], indices: Int[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the F1 score of each label, weighted by its number of items, for each resample, as scikit-learn defines it.

    Args:
        values: The label of each item, and the label that was predicted.
        indices: The items of each resample.
    """
    distinct_labels, label_numbers = np.unique(values[:, :2], return_inverse=True)
    labels, predictions = label_numbers.reshape(-1, 2).T
    label_count = len(distinct_labels)
    support, predicted = (count_codes(codes, indices, label_count) for codes in (labels, predictions))
    hits = count_codes(labels, indices, label_count, labels == predictions)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return np.asarray((support * f1).sum(axis=1) / indices.shape[1])


def count_codes(
    codes: Int[np.ndarray, " n"],
    indices: Int[np.ndarray, "r n"],
    code_count: int,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return how often each resample has each code, [R, C].

    Args:
        codes: The code of each item, from 0 to `code_count` - 1, such as the number of its label.
        indices: The items of each resample.
        code_count: Number of codes C.
        weights: How often an item counts, [N]. None: once.
    """
    first_bins = np.arange(len(indices))[:, None] * code_count  # each resample has its own bins
    item_weights = None if weights is None else weights[indices].ravel()
    counts = np.bincount((codes[indices] + first_bins).ravel(), item_weights, len(indices) * code_count)
    return counts.reshape(len(indices), code_count)


def _correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each row. It is NaN where a row is constant."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def compute_standard_error(items: ScoredItems) -> float:
    """Return the bootstrap standard error of a score: the standard deviation of the scores of resamples."""
    count = len(items.values)
    scores = [items.statistic(items.values, indices) for indices in _draw_resamples(count, STANDARD_ERROR_RESAMPLES)]
    return float(np.nanstd(np.concatenate(scores), ddof=1))


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two models' scores on the same items.

    Attributes:
        difference: The score of the first model minus that of the second.
        interval: The percentile confidence interval of the difference, at level `CONFIDENCE`.
        p_value: Two-sided p-value: twice the smaller of the shares of resamples with a difference <= 0 and >= 0.
        count: Number of items.
        unit: What an item is, in the plural.
        resampled_differences: The differences of the resamples, float64 [R].
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    count: int
    unit: str
    resampled_differences: np.ndarray

    @property
    def verdict(self) -> str:
        """Whether the first model is better or worse, if the interval excludes 0. Otherwise no difference is shown."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no difference shown"

    def summarize(self) -> dict[str, Any]:
        """Return the difference as plain values."""
        return {
            "difference": self.difference, "interval": list(self.interval), "p": self.p_value, "verdict": self.verdict,
            self.unit: self.count,
        }  # fmt: skip


def compare_items(first: ScoredItems, second: ScoredItems, seed: int | Sequence[int] = BOOTSTRAP_SEED) -> Difference:
    """Compare two models on the same items with the paired bootstrap.

    Args:
        first: Items with the values of the first model.
        second: The same items, in the same order, with the values of the second model.
        seed: Seed of the resamples.
    """
    count = len(first.values)
    if len(second.values) != count:
        raise ValueError(f"{count} and {len(second.values)} items (expected the same items)")
    resampled_differences = np.concatenate(
        [
            first.statistic(first.values, indices) - second.statistic(second.values, indices)
            for indices in _draw_resamples(count, RESAMPLES, seed)
        ]
    )
    return summarize_difference(first.score - second.score, resampled_differences, count, first.unit)


def summarize_difference(difference: float, resampled_differences: np.ndarray, count: int, unit: str) -> Difference:
    """Return a difference with the interval and the p-value of its resampled values."""
    tail_percent = 50 * (1 - CONFIDENCE)
    finite = resampled_differences[np.isfinite(resampled_differences)]
    if not len(finite):  # a score is undefined, for example because all vectors are equal
        return Difference(difference, (float("nan"), float("nan")), 1.0, count, unit, resampled_differences)
    low, high = np.percentile(finite, [tail_percent, 100 - tail_percent])
    rarer_sign_count = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    p_value = min(1.0, 2 * (rarer_sign_count + 1) / (len(finite) + 1))  # never 0: no finite number of resamples can show that
    return Difference(difference, (float(low), float(high)), p_value, count, unit, resampled_differences)


def _draw_resamples(count: int, resamples: int, seed: int | Sequence[int] = BOOTSTRAP_SEED) -> Iterator[np.ndarray]:
    """Yield blocks of resamples: `resamples` rows in total, each with `count` item indices, int64 [R, N]."""
    rng = np.random.default_rng(seed)
    block_size = max(1, MAX_DRAWN_ITEMS // count)
    for start in range(0, resamples, block_size):
        yield rng.integers(count, size=(min(block_size, resamples - start), count))
