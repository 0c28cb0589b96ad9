"""A report compares a run with what surrounds it: rows of papers, and the negatives that it was trained on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxembed.config import EvalSetConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import ClusteringSet, RetrievalSet, SimilaritySet
from jaxembed.evaluation.score_table import build_tables
from jaxembed.evaluation.tasks import GroupMember
from jaxembed.files import write_json
from jaxembed.reporting.held_out_views import view_set
from jaxembed.reporting.inputs import ReportedModel
from jaxembed.reporting.run_files import read_run_files
from jaxembed.reporting.score_files import ScoreFile, TaskScore, read_score_file
from jaxembed.reporting.score_sections import make_benchmark_section, make_summary_section
from jaxembed.reporting.training_sections import make_training_section
from jaxembed.reporting.training_views import open_training_sources


def test_training_rows_have_similarities_with_their_own_negatives(report: Any) -> None:
    page = report.path.read_text()
    assert ": training rows" in page and "12 of 12 examples" in page


def test_missing_training_files_leave_a_report(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxembed")
    files = read_run_files(run)
    assert [source.name for source in open_training_sources(files)] == ["<b>faq</b>"]
    (run.parent / "pairs.jsonl").rename(run.parent / "moved.jsonl")
    try:
        assert open_training_sources(files) == []
    finally:
        (run.parent / "moved.jsonl").rename(run.parent / "pairs.jsonl")
    assert "the report has no similarities of training rows" in caplog.text


def test_benchmarks_are_shown_next_to_published_rows(tmp_path: Path) -> None:
    group = GroupMember("MTEB(eng, v1)", "STS")
    models = []
    for name, widths in (("one", {}), ("two", {"64": 0.7, "32": 0.6})):
        scores = {"STS12": {"score": 0.7, "metric": "cosine_spearman", "type": "STS", "subsets": {"default": 0.7}}}
        if widths:
            scores["STS12"]["widths"] = widths
        (tmp_path / name).mkdir()
        task = SimpleNamespace(name="STS12", type="STS", groups=(group,))
        write_json(tmp_path / name / "scores.json", scores)
        tables = build_tables("folder, of it", [task], scores)  # type: ignore[list-item]
        write_json(tmp_path / name / "tables.json", [dataclasses.asdict(table) for table in tables])
        models.append(ReportedModel(name, name, None, read_score_file(tmp_path / name / "scores.json")))
    _, table = make_benchmark_section(models).tables
    assert [row[0] for row in table.rows[:3]] == ["two, 64", "two, 32", "one"] and "NV-Embed" in table.rows[3][0]
    assert table.columns == ["model", "STS (1)", "average"] and table.rows[0] == ["two, 64", "70.00", "70.00"]
    assert "NV-Embed, arXiv:2405.17428, Table 1" in table.caption
    write_json(tmp_path / "one" / "tables.json", [{"title": 3}])
    with pytest.raises(UserError, match=r"tables.json: not the tables that evaluate --out writes"):
        read_score_file(tmp_path / "one" / "scores.json")


def test_a_gain_over_a_negative_score_is_positive() -> None:
    scores = {"one": -0.2, "two": -0.1}
    models = [ReportedModel(name, name, None, ScoreFile("", {"A": TaskScore(score)})) for name, score in scores.items()]
    [table] = make_summary_section(models, dict.fromkeys(scores), None).tables
    assert [row[-1] for row in table.rows] == ["–", "+50.0 %"]


def test_the_number_of_a_repeated_objective_is_no_width() -> None:
    objective = SimpleNamespace(name="infonce")
    for dims, note in (((), ""), ((16,), "A part with a width is the loss of vectors truncated to that width (Matryoshka).")):
        stage = SimpleNamespace(objectives=[objective, objective], matryoshka=SimpleNamespace(dims=dims))
        row = {"step": 1, "loss": 2.0, "infonce": 1.0, "infonce_2": 1.0, **{f"infonce_{dim}": 1.0 for dim in dims}}
        run: Any = SimpleNamespace(name="run", config=SimpleNamespace(stages=[stage]), losses=[row])
        assert make_training_section([run]).charts[0].note == note


def test_texts_of_held_out_sets_have_the_prompts_of_training_evaluation() -> None:
    spec = EmbeddingSpec(prompts={"query": "query: ", "document": "passage: "}, fixed_prompts=True)
    prompts: list[str] = []

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        prompts.append(prompt)
        return np.eye(4, dtype=np.float32)[: len(texts)]

    embedder: Any = SimpleNamespace(spec=spec, encode=encode)
    texts, labels = ["a", "b"], np.array([0, 1])
    config = EvalSetConfig(name="own", path="own.jsonl", instruction="find")
    for held_out in (
        RetrievalSet(config, texts, texts, [{0: 1.0}, {1: 1.0}]),
        SimilaritySet(config, texts, texts, np.array([0.0, 1.0])),
        ClusteringSet(config, texts, labels),
    ):
        view = view_set(held_out, embedder)
        assert view is not None and view.text_groups[0].prompt == "query: "
    assert prompts == ["query: ", "passage: ", "query: ", "query: ", "query: "]
