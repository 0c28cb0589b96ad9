"""A submission to MTEB's leaderboard: its module is imported, its model loaded and run on mteb's mock tasks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers import tiny
from helpers.mteb_tasks import make_sts_task
from jaxembed import Embedder
from jaxembed.config import SourceConfig
from jaxembed.config.sections import parse_section
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.evaluation.mteb_submission import (
    ModelFacts,
    check_name,
    collect_metadata,
    find_training_tasks,
    format_module,
    read_facts,
    read_license,
    write_submission,
)  # fmt: skip
from jaxembed.evaluation.mteb_tasks import MtebTask
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import score_tasks
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.resolve import find_model


def import_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("submitted_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_written_model_passes_the_mock_run_of_mteb(tmp_path: Path) -> None:
    import mteb

    model = Embedder.load(tiny.write_folder(tmp_path / "base", "qwen3"))
    folder = tmp_path / "org" / "model"
    folder.parent.mkdir()
    export(model, folder, "float32", Card("model", "base"))
    spec = model.spec.replace(instruction_table="nv_embed", matryoshka_dims=(8,))
    encoder = TaskEncoder(lambda texts, prompt: model.encode(texts, prompt=prompt), spec, "model", "1", width=model.model.width)
    task = MtebTask(make_sts_task(), tmp_path / "results")
    scores = score_tasks(encoder, [task], tmp_path)
    facts = read_facts(find_model(str(folder)), "org/model")
    write_submission(tmp_path / "submission", facts, encoder, [task.task], tmp_path / "results")

    module = import_module(tmp_path / "submission" / "model.py")
    meta = module.model
    assert meta.name == "org/model" and meta.embed_dim == [model.model.width, 8] and meta.max_tokens == spec.max_length
    assert meta.n_parameters == sum(x.size for x in jax.tree.leaves(model.params))
    assert meta.training_datasets is None and "training data are unknown" in (tmp_path / "submission/model.py").read_text()
    results = tmp_path / "submission" / "results" / "org__model" / meta.revision
    assert json.loads((results / "model_meta.json").read_text())["name"] == "org/model"
    stored = mteb.results.TaskResult.from_disk(results / "STSBenchmark.json")
    assert stored.get_score() == pytest.approx(scores["STSBenchmark"]["score"], abs=1e-5)

    # mteb loads it, by the path of the folder in place of the name on the hub, and gives the same score.
    loaded = meta.model_copy(update={"name": str(folder), "embed_dim": None}).load_model()
    again = mteb.evaluate(loaded, make_sts_task(), cache=None, show_progress_bar=False).task_results[0]
    assert again.get_score() == pytest.approx(scores["STSBenchmark"]["score"], abs=1e-3)
    outcome = mteb.mock_run(loaded)
    assert outcome.all_passed and sum(status is not None for _, status in outcome.items()) > 10


def test_training_data_follow_from_the_sources() -> None:
    sources = [
        parse_section(SourceConfig, tree, "source")
        for tree in (
            {"catalog": "msmarco"}, {"path": "own.jsonl"}, {"path": "x.jsonl", "name": "scifact"},
            {"path": "hf:mteb/banking77:train", "name": "bank"},
        )
    ]  # fmt: skip
    tasks, others = find_training_tasks(sources)
    assert {"MSMARCO", "SciFact", "Banking77Classification"} <= set(tasks) and others == ["own"]
    encoder = TaskEncoder(lambda texts, prompt: np.zeros((0, 4)), EmbeddingSpec(), "m", "1", width=4)
    narrow = dataclasses.replace(encoder, widths=(2,), spec=EmbeddingSpec(matryoshka_dims=(3, 1)))
    assert collect_metadata(ModelFacts("org/model", 10, 5), narrow, tasks)["embed_dim"] == [2, 1]  # of the submitted results
    facts = ModelFacts("org/model", 10, 5, adapted_from="org/base", license="mit")
    text = format_module(collect_metadata(facts, encoder, tasks), {"STS12": "q: "}, others)
    assert "without a task of MTEB: own." in text and "'MSMARCO'" in text and "license='mit'" in text


def test_the_license_is_that_of_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_license(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# Title\n")
    assert read_license(tmp_path) == "apache-2.0"
    for front_matter, license_ in (
        ("license: 'MIT'\n", "mit"),
        ("license: https://a.org/License\n", "https://a.org/License"),
        ("license: own\n", ""),
        ("", ""),
    ):
        (tmp_path / "README.md").write_text(f"---\ntags: [a]\n{front_matter}---\n# Title\n---\nlicense: gpl-3.0\n---\n")
        assert read_license(tmp_path) == license_
    assert "mteb does not list the license 'own'" in caplog.text


def test_a_submission_needs_a_name(tmp_path: Path) -> None:
    assert check_name(None, "org/model") == "org/model"
    assert check_name("a/b", str(tmp_path)) == "a/b"
    with pytest.raises(UserError, match="Add --submission-name ORGANIZATION/MODEL"):
        check_name(None, str(tmp_path))
    with pytest.raises(UserError, match="'model' is not the name of a model on the hub"):
        check_name("model", str(tmp_path))
