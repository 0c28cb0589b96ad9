"""`data stats --vectors`: rank, coverage, clusters, languages, and nearness of sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.mining import StubEncoder
from helpers.sources import write_jsonl
from jaxembed.curation.data_insight import (
    TextSample,
    compute_effective_rank,
    compute_perplexity,
    describe_coverage,
    describe_nearness,
)
from jaxembed.data import __main__ as data_command
from jaxembed.errors import UserError


def draw_unit_vectors(count: int, center: int, width: int = 16, seed: int = 0) -> np.ndarray:
    vectors = 0.3 * np.random.default_rng(seed).normal(size=(count, width)) + 4 * np.eye(width)[center]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_effective_rank_counts_directions_of_equal_variance() -> None:
    rng = np.random.default_rng(0)
    for directions in (1, 3, 6):
        vectors = np.zeros((4000, 8))
        vectors[:, :directions] = rng.choice([-1.0, 1.0], size=(4000, directions))
        assert compute_effective_rank(vectors) == pytest.approx(directions, rel=0.01)
    assert compute_perplexity(np.array([1.0, 1.0, 0.0])) == pytest.approx(2) and compute_perplexity(np.zeros(3)) == 1


def test_coverage_counts_clusters() -> None:
    assert describe_coverage(np.array([0, 0, 1, 1]), 4) == {"coverage": 0.5, "effective_clusters": 2.0}


def test_nearness_tells_the_same_distribution_from_another_one() -> None:
    def sample(name: str, center: int, seed: int) -> TextSample:
        return TextSample(name, ["x"] * 300, draw_unit_vectors(300, center, seed=seed))

    same = describe_nearness(sample("a", 0, 1), sample("b", 0, 2))
    other = describe_nearness(sample("a", 0, 1), sample("c", 5, 3))
    assert same["relation"] == "in-domain" and 0.4 < same["near_share"] < 0.6
    assert other["relation"] == "out-of-domain" and other["near_share"] == 0
    assert other["mean_cosine"] < same["mean_cosine"]


def run_stats(*arguments: str) -> dict[str, Any]:
    return data_command.main(data_command.make_parser().parse_args(["stats", *arguments]))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("jaxembed.hub.frozen_encoder.open_frozen_encoder", lambda name, cache: StubEncoder())
    monkeypatch.setattr("jaxembed.hub.frozen_encoder.check_model_exists", lambda name: None)
    texts = {"first": (1, 2), "second": (2, 3)}
    for name, numbers in texts.items():
        rows = [{"query": f"how is it with the number {numbers[i % 2]} {'x' * i}", "pos": ["p"]} for i in range(40)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return [str(tmp_path / f"{name}.jsonl") for name in texts]


def test_the_command_reports_sources_and_evaluation_sets(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    report = run_stats(*files, "--vectors", "M", "--clusters", "3", "--against", files[0], "--max-texts", "20")["vectors"]
    assert [source["texts"] for source in report["sources"]] == [20, 20]
    assert all(source["languages"].get("en", 0) > 10 for source in report["sources"])
    assert sum(cluster["texts"] for cluster in report["clusters"]) == 40 and len(report["clusters"]) == 3
    assert [(row["source"], row["target"]) for row in report["nearness"]] == [("first", "second"), ("second", "first")]
    itself = report["evaluation"][0]
    assert itself["near_share"] == 1 and itself["mean_cosine"] == 1
    assert "| effective rank |" in capsys.readouterr().out
    json.dumps(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "x.jsonl"], r"--against: compares vectors. Name their model with --vectors MODEL"),
        (["--vectors", "M", "--against", "absent.jsonl"], r"absent.jsonl: no such file or folder"),
        (["--vectors", "M", "--clusters", "900"], r"--clusters is 900, but the sources have only 80 texts. Lower it"),
    ],
)
def test_bad_options_are_one_line(files: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_stats(*files, *arguments)


def test_an_absent_model_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": ["p"]}])
    with pytest.raises(UserError, match="no-such-folder: neither a folder"):
        run_stats(str(path), "--vectors", "no-such-folder")
