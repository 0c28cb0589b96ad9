"""Runs with graded objectives: training on scores, and the one-line errors of sources without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import make_config, make_staged_config, read_losses, use_one_device, write_base_and_data
from jaxembed.config import Config
from jaxembed.errors import UserError
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics

UAE = [
    {"name": "cosent"},
    {"name": "infonce", "directions": ["query_document", "query_query", "document_query", "document_document"],
     "per_direction": True, "weight": 0.5, "sources": ["sts"]},
    {"name": "angle", "sources": ["sts"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("graded"))


def list_sources(folder: Path, **keys: Any) -> list[dict[str, Any]]:
    return [{"path": str(folder / "pairs.jsonl")}, {"path": str(folder / "sts.jsonl"), "min_score": 1, **keys}]


def make_graded_config(folder: Path, run: str, objectives: list[dict[str, Any]], **keys: Any) -> Config:
    sources = list_sources(folder, **keys)
    overrides = f"data.sources={json.dumps(sources)}", f"objectives={json.dumps(objectives)}"
    return make_config(folder, run, *overrides, "eval.sets=[]", "train.steps=1")


def test_a_stage_of_graded_objectives_after_one_of_pairs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With Matryoshka, gradient caching and LoRA. The stage of pairs takes only the positives."""
    use_one_device(monkeypatch)
    regression = {"name": "cosine_regression", "weight": 0.1}
    stages = [
        {"train": {"steps": 1}},
        {"train": {"steps": 24}, "objectives": [*UAE, regression], "matryoshka": {"dims": [16]}, "gradcache": {"rows": 2},
         "optim": {"learning_rate": 5e-3, "warmup_steps": 0}},
    ]  # fmt: skip
    sources = f"data.sources={json.dumps(list_sources(folder))}"
    lora = "model.lora={rank: 4}"
    with caplog.at_level("INFO", "jaxembed"):
        result = train(make_staged_config(folder, "staged", stages, sources, lora, "data.hard_negatives=0", "eval.sets=[]"))
    assert result["step"] == 25
    rows = [row for row in read_metrics(folder / "staged") if "cosent" in row]
    assert len(rows) == 24 and np.mean([r["cosent"] for r in rows[-6:]]) < 0.7 * np.mean([r["cosent"] for r in rows[:4]])
    assert all(0 < row["cosent_pairs"] < 16 and {"angle_16", "infonce_16", "cosine_regression_16"} < set(row) for row in rows)
    assert "  graded: scores from 0 to 1; 48 pairs have at least min_score, 1, and are positives" in caplog.messages
    assert any(message.startswith("sts (scored_pairs): 48 examples") for message in caplog.messages)  # of the first stage
    assert any(message.startswith("sts (scored_pairs): 96 examples") for message in caplog.messages)


def test_a_graded_run_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_device(monkeypatch)
    config = make_graded_config(folder, "resumed", [{"name": "cosine_regression"}])
    train(config)
    assert train(config)["step"] == 1
    assert len(read_losses(folder / "resumed")) == 1


@pytest.mark.parametrize(
    ("objectives", "keys", "message"),
    [
        (
            [{"name": "cosent", "sources": ["sts", "pairs"]}], {},
            "objectives.0: cosent needs scores, but source pairs has no scores (format pairs; expected scored_pairs). Name",
        ),
        (
            [{"name": "infonce"}, {"name": "angle", "sources": ["sts"]}], {"graded": False},
            "objectives.1: angle needs scores, but source sts does not keep its scores (graded is false; expected true). Name",
        ),
        (
            [{"name": "cosine_regression"}], {"graded": False},
            "objectives.0: cosine_regression needs scores, but no source has any (expected a source of rows of sentence1, ",
        ),
        (
            [{"name": "cosent", "sources": ["stss"]}], {},
            "objectives.0.sources contains 'stss' (expected names of sources: pairs, sts)",
        ),
        (
            [{"name": "infonce"}, {"name": "cosent"}], {"min_score": 4},
            "objectives.0: infonce needs positives, but no pair of source sts has a score of 4.0 or more. Lower the source's",
        ),
        ([{"name": "cosent"}], {"score_range": [0, 0.5]}, 'sts.jsonl:2: "score" is 1 (expected 0 to 0.5, the source\'s score'),
    ],
)  # fmt: skip
def test_errors_of_graded_objectives(folder: Path, objectives: Any, keys: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        train(make_graded_config(folder, "refused", objectives, **keys))
    assert message in str(error.value)
