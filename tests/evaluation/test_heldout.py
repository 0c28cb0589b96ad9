"""Held-out sets of every kind: their scores are those of mteb on the same vectors, and bad files are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from helpers.held_out import encode_words, make_labeled_texts, make_scored_pairs, write_beir, write_rows
from jaxembed.config import EvalSetConfig
from jaxembed.config.sections import parse_section
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import HeldOutSet, RetrievalSet, open_held_out_sets, score_set, score_sets
from jaxembed.evaluation.labels import cluster
from jaxembed.evaluation.mteb_encoder import MtebEncoder
from jaxembed.evaluation.task_encoder import TaskEncoder


def open_set(path: Path, kind: str, **settings: str) -> Any:
    [held_out] = open_held_out_sets([EvalSetConfig(name="set", path=str(path), kind=kind, **settings)], path.parent / "cache")
    return held_out


def score_by_mteb(task: Any, splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return mteb's scores of the vectors of `encode_words` on a task with other data."""
    task.dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    task.data_loaded = True
    encoder = MtebEncoder(TaskEncoder(encode_words, EmbeddingSpec(), "words", "1"))
    split = "train" if set(splits) == {"train"} else "test"
    return dict(task.evaluate(encoder, split, encode_kwargs={})["default"])


def number_labels(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    names = sorted({row["label"] for row in rows})
    return [{"text": row["text"], "label": names.index(row["label"])} for row in rows]


def test_classification_has_the_score_of_mteb(tmp_path: Path) -> None:
    from mteb.mocks import MockClassificationTask

    test, train = make_labeled_texts(60, seed=0), make_labeled_texts(90, seed=1)
    held_out = open_set(
        write_rows(tmp_path / "test.jsonl", test), "classification", train_path=str(write_rows(tmp_path / "train.jsonl", train))
    )
    found = score_set(held_out, encode_words)
    theirs = score_by_mteb(MockClassificationTask(), {"test": number_labels(test), "train": number_labels(train)})
    assert 0.4 < theirs["accuracy"] < 1
    assert found.scores == {"accuracy": pytest.approx(theirs["accuracy"]), "f1": pytest.approx(theirs["f1"])}
    assert found.items.score == found.scores["accuracy"] and len(found.items.values) == 60


def test_cross_validation_has_the_score_of_mteb(tmp_path: Path) -> None:
    from mteb.mocks import MockClassificationTask

    rows = make_labeled_texts(100, seed=2)  # a multiple of the folds: mteb's mean is over folds, not texts
    task = MockClassificationTask()
    task.is_cross_validation = True
    theirs = score_by_mteb(task, {"train": number_labels(rows)})
    found = score_set(open_set(write_rows(tmp_path / "all.jsonl", rows), "classification"), encode_words)
    assert found.scores["accuracy"] == pytest.approx(theirs["accuracy"])


def test_clustering_has_the_score_of_mteb(tmp_path: Path) -> None:
    from mteb.mocks import MockClusteringTask
    from sklearn.metrics import v_measure_score

    rows = make_labeled_texts(80, seed=3)
    held_out = open_set(write_rows(tmp_path / "all.jsonl", rows), "clustering")
    columns = {"sentences": [row["text"] for row in rows], "labels": [row["label"] for row in rows]}
    theirs = score_by_mteb(MockClusteringTask(), {"test": [columns]})["v_measure"]
    assert v_measure_score(columns["labels"], cluster(encode_words(columns["sentences"]), 4, clusterings=1)[:, 0]) == theirs
    assert score_set(held_out, encode_words).scores["v_measure"] == pytest.approx(theirs, abs=0.2)  # over ten seeds


def test_similarity_has_the_score_of_mteb(tmp_path: Path) -> None:
    from mteb.mocks import MockSTSTask

    rows = make_scored_pairs(50)
    theirs = score_by_mteb(MockSTSTask(), {"test": rows})
    found = score_set(open_set(write_rows(tmp_path / "sts.jsonl", rows), "sts"), encode_words)
    expected = {"spearman": theirs["cosine_spearman"], "pearson": theirs["cosine_pearson"]}
    assert found.scores == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}


def test_retrieval_scores_come_with_those_of_bm25(tmp_path: Path) -> None:
    held_out: RetrievalSet = open_set(write_beir(tmp_path / "beir"), "retrieval")
    found, random = score_set(held_out, encode_words), score_set(held_out, lambda texts, _: encode_words(texts, noise=9.0))
    assert set(found.scores) == {"ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10", "map_at_100"}
    assert found.scores["recall_at_100"] == random.scores["recall_at_100"] == 1  # of 30 documents
    assert random.scores["ndcg_at_10"] < 0.6 < found.scores["ndcg_at_10"]
    assert held_out.score_bm25().scores["ndcg_at_10"] > 0.6
    assert found.items.score == pytest.approx(found.scores["ndcg_at_10"])


def test_training_logs_the_main_scores(tmp_path: Path) -> None:
    labels, pairs = (
        write_rows(tmp_path / "l.jsonl", make_labeled_texts(40, 0)),
        write_rows(tmp_path / "s", make_scored_pairs(9)),
    )
    files = {"retrieval": write_beir(tmp_path / "beir"), "sts": pairs, "classification": labels, "clustering": labels}
    configs = [EvalSetConfig(name=kind, kind=kind, path=str(path)) for kind, path in files.items()]
    sets: list[HeldOutSet] = open_held_out_sets(configs, tmp_path / "cache")
    expected = {
        "retrieval/ndcg_at_10", "retrieval/recall_at_10", "sts/spearman", "classification/accuracy", "clustering/v_measure",
    }  # fmt: skip
    assert set(score_sets(sets, encode_words)) == expected
    assert {f"{s.config.name}/{s.metric}" for s in sets} <= expected


def test_texts_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 3 - 1} for i in range(30)]
    held_out = open_set(write_rows(tmp_path / "labels.jsonl", rows), "clustering")
    assert len(held_out.texts) == 20 and len(np.unique(held_out.labels)) == 2


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    one_label = write_rows(tmp_path / "one.jsonl", [{"text": f"text {i}", "label": "a"} for i in range(8)])
    few = write_rows(tmp_path / "few.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    no_scores = write_rows(tmp_path / "pairs.jsonl", [{"sentence1": "a", "sentence2": "b"}])
    no_qrels = write_beir(tmp_path / "beir")
    (no_qrels / "qrels" / "test.tsv").unlink()
    for path, kind, problem in (
        (one_label, "classification", "all 8 texts have one label, 'a' (expected two labels or more)."),
        (one_label, "clustering", "all 8 texts have one label, 'a' (expected two labels or more)."),
        (few, "classification", "2 labeled texts (expected at least 5, for cross-validation). Add texts."),
        (no_scores, "sts", ':1: "score" is missing (expected a finite number). The row has sentence1, sentence2.'),
        (no_qrels, "retrieval", "qrels/test.tsv is missing (expected it next to corpus.jsonl and queries.jsonl)."),
        (tmp_path / "none.jsonl", "classification", "no such file or folder."),
    ):
        with pytest.raises(UserError, match=re.escape(problem)) as error:
            open_set(path, kind)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"set: train_path and train_split are keys of classification sets \(kind is sts\)"):
        parse_section(EvalSetConfig, {"name": "set", "kind": "sts", "path": "x", "train_path": "y"}, "FILE")
