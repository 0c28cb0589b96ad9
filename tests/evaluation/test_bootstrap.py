"""The bootstrap against scipy, and what it says of models that differ and of those that do not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, v_measure_score

from jaxembed.evaluation import bootstrap
from jaxembed.evaluation.bootstrap import (
    ScoredItems,
    Statistic,
    compare_items,
    compute_standard_error,
    score_average_precision,
    score_equal_share,
    score_mean,
    score_pearson,
    score_spearman,
    score_weighted_f1,
)
from jaxembed.evaluation.labels import score_sampled_v_measure, score_v_measure


def make_items(statistic: Statistic, columns: int, seed: int, shift: float = 0.0) -> ScoredItems:
    """Make 60 items that two seeds share in part."""
    shared = np.random.default_rng(7).normal(size=(60, columns))
    values = shared + 0.5 * np.random.default_rng(seed).normal(size=(60, columns)) + shift
    if columns == 2:
        values[:, 1] = shared[:, 0]  # the given similarity, the same for both models
    return ScoredItems(values, statistic, "items")


def test_paired_interval_equals_that_of_scipy() -> None:
    first, second = (make_items(score_mean, 1, seed, shift) for seed, shift in ((1, 0.2), (2, 0.0)))
    found = compare_items(first, second)
    theirs = stats.bootstrap(
        (first.values[:, 0], second.values[:, 0]), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True,
        vectorized=True, n_resamples=bootstrap.RESAMPLES, method="percentile",
        rng=np.random.default_rng(bootstrap.BOOTSTRAP_SEED),
    )  # fmt: skip
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval), abs=1e-12)
    assert np.std(found.resampled_differences, ddof=1) == pytest.approx(theirs.standard_error, abs=1e-12)
    assert found.difference == pytest.approx(first.values.mean() - second.values.mean())


def test_paired_interval_of_correlations_agrees_with_scipy() -> None:
    first, second = (make_items(score_spearman, 2, seed) for seed in (1, 2))
    pairs = np.stack([first.values[:, 0], second.values[:, 0], first.values[:, 1]])

    def difference(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
        return float(stats.spearmanr(a, given).statistic - stats.spearmanr(b, given).statistic)

    theirs = stats.bootstrap(
        tuple(pairs), difference, paired=True, vectorized=False, n_resamples=400, method="percentile",
        rng=np.random.default_rng(3),
    )  # fmt: skip
    found = compare_items(first, second)
    assert found.difference == pytest.approx(difference(*pairs))
    error = theirs.standard_error / 2  # of the ends of an interval from 400 resamples
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval), abs=error)


def test_standard_error_agrees_with_the_formula_of_a_mean() -> None:
    items = make_items(score_mean, 1, seed=1)
    expected = items.values.std() / np.sqrt(len(items.values))
    assert compute_standard_error(items) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(("statistic", "reference"), [(score_spearman, stats.spearmanr), (score_pearson, stats.pearsonr)])
def test_correlations_of_resamples_equal_those_of_scipy(statistic: Statistic, reference: object) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(5, size=(40, 2)).astype(float)  # with equal values
    indices = rng.integers(40, size=(3, 40))
    expected = [reference(*values[chosen].T).statistic for chosen in indices]  # type: ignore[operator]
    assert statistic(values, indices) == pytest.approx(expected, abs=1e-12)


def test_average_precisions_of_resamples_equal_those_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(9, size=50), rng.integers(2, size=50)], axis=1).astype(float)  # with equal similarities
    indices = rng.integers(50, size=(3, 50))
    expected = [average_precision_score(chosen[:, 1], chosen[:, 0]) for chosen in values[indices]]
    assert score_average_precision(values, indices) == pytest.approx(expected, abs=1e-12)


def test_v_measures_of_resamples_equal_those_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(4, size=(50, 3)).astype(float)
    indices = rng.integers(50, size=(3, 50))
    expected = [np.mean([v_measure_score(c[:, 0], c[:, i]) for i in (1, 2)]) for c in values[indices]]
    assert score_v_measure(values, indices) == pytest.approx(expected, abs=1e-9)
    assert score_v_measure(np.zeros((5, 2)), np.arange(5)[None]) == 1  # one label, one cluster


def test_v_measures_of_drawn_texts_equal_those_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    columns = [column for _ in range(2) for column in (*rng.integers(4, size=(2, 50)), rng.integers(3, size=50))]
    values = np.column_stack(columns).astype(float)
    for indices in rng.integers(50, size=(3, 50)):
        samples = [(values[np.repeat(indices, values[indices, i + 2].astype(int))], i) for i in (0, 3)]
        expected = np.mean([v_measure_score(texts[:, i], texts[:, i + 1]) for texts, i in samples])
        assert score_sampled_v_measure(values, indices[None]) == pytest.approx([expected], abs=1e-9)


def test_translations_of_resamples_are_scored_as_by_sklearn() -> None:
    rng = np.random.default_rng(0)
    gold = np.arange(50)
    values = np.stack([gold, np.where(rng.random(50) < 0.5, gold, rng.integers(50, size=50))], axis=1).astype(float)
    indices = rng.integers(50, size=(3, 50))
    expected = [f1_score(*chosen.T, average="weighted", zero_division=0) for chosen in values[indices]]
    assert score_weighted_f1(values, indices) == pytest.approx(expected, abs=1e-12)
    assert score_equal_share(values, indices) == pytest.approx([accuracy_score(*chosen.T) for chosen in values[indices]])


def test_verdicts() -> None:
    base = make_items(score_mean, 1, seed=1)
    better = ScoredItems(base.values + 0.3 + 0.1 * np.random.default_rng(0).normal(size=base.values.shape), score_mean, "items")
    other = ScoredItems(base.values + np.random.default_rng(1).normal(size=base.values.shape), score_mean, "items")
    assert (compare_items(better, base).verdict, compare_items(base, better).verdict) == ("better", "worse")
    assert compare_items(better, base).p_value < 0.01
    assert compare_items(other, base).verdict == "no difference shown" and compare_items(other, base).p_value > 0.05
    same = compare_items(base, base)
    assert (same.difference, same.interval, same.p_value, same.verdict) == (0, (0, 0), 1, "no difference shown")
    assert same.summarize() == {"difference": 0, "interval": [0, 0], "p": 1, "verdict": "no difference shown", "items": 60}


def test_items_of_undefined_scores_show_no_difference() -> None:
    constant = ScoredItems(np.ones((10, 2)), score_spearman, "pairs")
    found = compare_items(constant, constant)
    assert found.verdict == "no difference shown" and found.p_value == 1
    with pytest.raises(ValueError, match="10 and 4 items"):
        compare_items(constant, ScoredItems(np.ones((4, 2)), score_spearman, "pairs"))
