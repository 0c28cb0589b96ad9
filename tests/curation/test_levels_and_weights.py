"""Steps of a curation that judge, group and order rows: judge, cluster, curriculum, and balance by weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.curation import pair, run_all_rows_step
from jaxembed.config.curation import BalanceStepConfig, CurateConfig, CurriculumStepConfig
from jaxembed.config.curation_models import JudgeStepConfig
from jaxembed.config.sections import parse_section
from jaxembed.curation.steps.balance import divide_rows
from jaxembed.curation.steps.curated_row import CuratedRow, StepOutcome
from jaxembed.curation.steps.curriculum import find_difficulty
from jaxembed.curation.steps.judged_rows import make_judge_step
from jaxembed.errors import UserError
from jaxembed.search.clustering import cluster_vectors

# judge


def score_length(pairs: Any) -> np.ndarray:
    return np.array([len(document) / 10 for _, document in pairs], np.float32)


def test_scores_are_written_and_documents_are_dropped_by_score() -> None:
    config = JudgeStepConfig(judge={"model": "J"}, min_positive=0.3, max_negative=0.8, negative_margin=0.1)
    step = make_judge_step(config, lambda: score_length)
    rows = [
        pair("q", "12345", "1", neg=["1234", "12345", "123456789", "12"], neg_scores=[9, 9, 9, 9]),
        pair("q", "1", "12", neg=["1"]),
        CuratedRow(0, 1, "text", {"text": "t"}),
        pair("q", "12345"),
    ]
    outcomes = step(rows)
    assert outcomes[0].row == {
        "query": "q", "pos": ["12345"], "neg": ["1234", "12"], "pos_scores": [0.5], "neg_scores": [0.4, 0.2]
    }  # fmt: skip
    assert Counter(outcomes[0].reasons) == {
        "positives: scored below min_positive": 1,
        "negatives: scored too near a positive": 1,
        "negatives: scored above max_negative": 1,
    }
    assert outcomes[1] == StepOutcome(None, ("positives: scored below min_positive",))
    assert outcomes[2] == StepOutcome({"text": "t"})
    assert outcomes[3].row == {"query": "q", "pos": ["12345"], "neg": [], "pos_scores": [0.5]}


# balance by weights


def test_rows_are_divided_by_weight_and_size_up_to_what_there_is() -> None:
    assert divide_rows(100, [1, 1, 2], [1000, 1000, 1000]) == [25, 25, 50]
    assert divide_rows(100, [1, 1, 2], [10, 1000, 1000]) == [10, 30, 60]
    assert divide_rows(10, [1, 1, 1], [1000, 1000, 1000]) == [4, 3, 3]
    assert divide_rows(100, [1, 0], [5, 5]) == [5, 0]


def test_groups_are_drawn_by_weights_and_exponent(tmp_path: Path) -> None:
    rows = [pair(f"q{i}", "p", topic="rare" if i < 20 else "common") for i in range(200)]

    def count(name: str, **keys: Any) -> dict[str, int]:
        outcomes = run_all_rows_step(BalanceStepConfig(by="topic", **keys), tmp_path / name, rows)
        return dict(Counter(outcome.row["topic"] for outcome in outcomes if outcome.row))

    assert count("a", rows=100) == {"rare": 10, "common": 90}
    assert count("b", rows=20, exponent=0) == {"rare": 10, "common": 10}
    assert count("c", rows=40, exponent=0.5) == {"rare": 10, "common": 30}
    assert count("d", rows=20, weights={"rare": 9}) == {"rare": 10, "common": 10}
    assert count("e", rows=20, weights={"rare": 0}) == {"common": 20}
    assert count("f", rows=500, max_rows=30) == {"rare": 20, "common": 30}
    with pytest.raises(UserError, match="balance by topic: weights has 'rar', but no row has this value"):
        count("g", rows=20, weights={"rar": 1})
    config = BalanceStepConfig(rows=6, weights={"source1": 2})
    sourced = [pair(f"q{i}", "p", source=i % 2) for i in range(20)]
    outcomes = run_all_rows_step(config, tmp_path / "h", sourced)
    assert Counter(row.source for row, outcome in zip(sourced, outcomes, strict=True) if outcome.row) == {0: 2, 1: 4}


# curriculum


def test_levels_follow_the_difficulty_whatever_the_order(tmp_path: Path) -> None:
    rows = [pair(f"q{i}", "p", neg=["n"], pos_scores=[0.5, 0.9], neg_scores=[0.0, i / 10]) for i in range(9)]
    for name, order in {"a": rows, "b": rows[::-1]}.items():
        outcomes = run_all_rows_step(CurriculumStepConfig(), tmp_path / name, order)
        levels = {outcome.row["query"]: outcome.row["level"] for outcome in outcomes if outcome.row}
        assert levels == {f"q{i}": 1 + i // 3 for i in range(9)}
    outcomes = run_all_rows_step(CurriculumStepConfig(descending=True, levels=9, field="rank"), tmp_path / "c", rows)
    assert [outcome.row["rank"] for outcome in outcomes if outcome.row] == list(range(9, 0, -1))
    assert find_difficulty({"n": 10**400}, "n") == np.inf and find_difficulty({"n": -(10**400)}, "n") == -np.inf


def test_a_difficulty_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"curriculum by hardness: no row has a number in this field \(the first row has query, pos"
    ):
        run_all_rows_step(CurriculumStepConfig(by="hardness"), tmp_path, [pair("q", "p", hardness="very")])


# cluster


def test_clusters_are_those_of_separate_groups_in_any_order() -> None:
    rng = np.random.default_rng(0)
    centers = np.eye(4, 6)
    truth = np.repeat(np.arange(4), [40, 30, 20, 10])
    vectors = (centers[truth] + 0.1 * rng.normal(size=(100, 6))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = rng.permutation(100)
    found = cluster_vectors(vectors[order], 4, seed=0)
    assert found.labels.tolist() == truth[order].tolist()  # clusters are numbered by size
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-5)
    assert (found.similarities > 0.8).all()
    assert cluster_vectors(np.ones((5, 2), np.float32) / np.sqrt(2).astype(np.float32), 3, seed=0).labels.tolist() == [0] * 5


# Bad input


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "balance", "exponent": 0.5}, "a balance step needs rows, max_rows or share. Set one of them"),
        ({"name": "balance", "max_rows": 5, "exponent": 0.5}, "exponent and weights apply only to rows"),
        ({"name": "balance", "rows": 5, "share": 0.5}, "rows and share exclude each other"),
        ({"name": "balance", "rows": 5, "weights": {"a": -1}}, "steps.0.weights.a is -1"),
        ({"name": "curriculum", "levels": 1}, r"steps.0.levels is 1 \(expected a number that is at least 2\)"),
        ({"name": "cluster", "model": "M"}, "steps.0.clusters"),
        ({"name": "language", "pairs": "same", "sides": ["query"]}, "pairs and language_pairs judge documents, but sides has"),
        ({"name": "judge"}, "steps.0.judge"),
        ({"name": "cluster", "modle": "M", "clusters": 2}, r"unknown key steps.0.modle. Did you mean steps.0.model\?"),
        (
            {"name": "judge", "judge": {"model": "J", "template": "{document}"}},
            r"template must contain \{query\} and then",
        ),
        ({"name": "judge", "judge": {"model": "J", "modl": "J"}}, "steps.0.judge.modl"),
    ],
)
def test_bad_keys_are_one_line(step: dict[str, Any], message: str) -> None:
    tree = {"out": "out", "sources": [{"path": "a.jsonl"}], "steps": [step]}
    with pytest.raises(UserError, match=message) as error:
        parse_section(CurateConfig, tree, "config.yaml")
    assert "\n" not in str(error.value)


def test_fields_that_steps_write_are_in_the_output() -> None:
    steps = [{"name": "curriculum", "field": "stage"}, {"name": "cluster", "model": "M", "clusters": 2}]
    config = CurateConfig.model_validate({"out": "o", "sources": [{"path": "a"}], "steps": steps, "metadata": ["year"]})
    assert config.output_metadata == ("year", "stage", "cluster")
