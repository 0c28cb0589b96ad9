"""Results of mteb tasks by item, their comparison, and their texts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from helpers.held_out import TOPICS, WORDS, encode_words, make_labeled_texts, make_scored_pairs
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.evaluation.comparison import compare_tasks
from jaxembed.evaluation.mteb_items import NO_ITEMS_REASON
from jaxembed.evaluation.mteb_tasks import MtebTask
from jaxembed.evaluation.task_encoder import TaskEncoder


def make_encoder(noise: float = 0.0) -> TaskEncoder:
    return TaskEncoder(functools.partial(encode_words, noise=noise), EmbeddingSpec(), "words", f"noise-{noise}")


def with_data(task: Any, data: Any) -> Any:
    task.dataset = data
    task.data_loaded = True
    return task


def make_tasks() -> dict[str, Any]:
    """Make mteb tasks of several types with data that differ between encoders."""
    from mteb import mocks

    labeled = [{**row, "label": TOPICS.index(row["label"])} for row in make_labeled_texts(60, seed=0)]
    scored = make_scored_pairs(60)
    pairs = [{"sentence1": r["sentence1"], "sentence2": r["sentence2"], "labels": int(r["score"] > 1)} for r in scored]
    texts = [row["sentence1"] for row in scored]
    retrieval = {
        "corpus": Dataset.from_list([{"id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]),
        "queries": Dataset.from_list([{"id": f"q{i}", "text": " ".join(text.split()[:2])} for i, text in enumerate(texts)]),
        "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(60)},
        "top_ranked": None,
    }  # fmt: skip
    clusters = [{"sentences": [row["text"] for row in labeled[:40]], "labels": [str(row["label"]) for row in labeled[:40]]}]
    fast = mocks.MockMultilingualClusteringFastTask()
    fast.max_document_to_embed, fast.max_documents_per_cluster = 50, 45
    levels = [{"sentences": row["text"], "labels": [str(row["label"] // 2), str(row["label"])]} for row in labeled]
    summarized = [
        {
            "text": row["text"],
            "human_summaries": [row["text"]],
            "machine_summaries": [row["text"], " ".join(row["text"].split()[:2]), *WORDS[i % 20 : i % 20 + 2]],
            "relevance": [1.0, 0.8, 0.1, 0.0],
        }
        for i, row in enumerate(labeled)
    ]
    translated = {"eng_Latn": texts, "fra_Latn": [" ".join(text.split()[:3]) for text in texts]}
    return {
        "SampledClustering": with_data(
            fast, {subset: DatasetDict({"test": Dataset.from_list(levels)}) for subset in ("eng", "fra")}
        ),
        "BitextMining": with_data(
            mocks.MockMultilingualParallelBitextMiningTask(), DatasetDict({"test": Dataset.from_dict(translated)})
        ),
        "Summarization": with_data(mocks.MockSummarizationTask(), DatasetDict({"test": Dataset.from_list(summarized)})),
        "Retrieval": with_data(mocks.MockRetrievalTask(), {"default": {"val": retrieval, "test": dict(retrieval)}}),
        "STS": with_data(mocks.MockSTSTask(), DatasetDict({"test": Dataset.from_list(scored)})),
        "Classification": with_data(
            mocks.MockClassificationTask(),
            DatasetDict({"test": Dataset.from_list(labeled[:30]), "train": Dataset.from_list(labeled[30:])}),
        ),
        "PairClassification": with_data(mocks.MockPairClassificationTask(), DatasetDict({"test": Dataset.from_list(pairs)})),
        "Clustering": with_data(mocks.MockClusteringTask(), DatasetDict({"test": Dataset.from_list(clusters)})),
    }


UNITS = {
    "Retrieval": "queries",
    "STS": "pairs",
    "Classification": "texts",
    "PairClassification": "pairs",
    "Clustering": "texts",
    "SampledClustering": "texts",
    "BitextMining": "texts",
    "Summarization": "texts",
}


@pytest.mark.parametrize("kind", UNITS)
def test_items_give_the_score_of_mteb(kind: str) -> None:
    task = MtebTask(make_tasks()[kind])
    good, poor = (task.score_items(make_encoder(noise)) for noise in (0.0, 8.0))
    assert not good.missing_reason and not poor.missing_reason
    assert good.parts[0].unit == UNITS[kind]
    for found in (good, poor):
        assert sum(part.score for part in found.parts) / len(found.parts) == pytest.approx(found.summary["score"], abs=1e-3)
    comparison = compare_tasks({task.name: good}, {task.name: poor}, ("good", "poor"))
    [difference] = comparison["differences"].values()
    assert difference["verdict"] == "better" and difference[UNITS[kind]] >= 30


def test_every_model_and_width_is_scored_on_the_same_samples() -> None:
    task = MtebTask(make_tasks()["SampledClustering"])
    encoder = make_encoder()
    first, again = task.score(encoder)["score"], task.score(encoder)["score"]
    encoder.widths = (32, 31)
    assert first == again == task.score(encoder)["widths"]["32"]
    fresh = MtebTask(make_tasks()["SampledClustering"])
    encoder.widths = (31,)
    assert fresh.score(encoder)["score"] == task.score(encoder)["score"]


def test_a_task_without_items_has_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    task = MtebTask(make_tasks()["Summarization"])
    monkeypatch.setattr(task.task, "_save_task_predictions", lambda *_, **__: None)
    found = task.score_items(make_encoder())
    assert found.missing_reason == NO_ITEMS_REASON and not found.parts
    comparison = compare_tasks({task.name: found}, {task.name: found}, ("a", "b"))
    assert comparison["differences"][task.name]["no_interval"] == NO_ITEMS_REASON
    assert comparison["conclusion"].endswith(f"Without an interval: {task.name}.") and "mean" not in comparison


def test_texts_without_a_score_leave_no_interval() -> None:
    """mteb skips a text whose summaries are equally similar, so two models may have other texts."""
    task = make_tasks()["Summarization"]
    rows = [*task.dataset["test"]]
    rows[0]["machine_summaries"] = ["bank0"] * 4
    found = MtebTask(with_data(task, DatasetDict({"test": Dataset.from_list(rows)}))).score_items(make_encoder())
    assert "mteb left out texts" in found.missing_reason


def test_items_that_do_not_give_the_score_are_not_used() -> None:
    task = make_tasks()["Retrieval"]
    task.ignore_identical_ids = True
    assert "results by item are not known" in MtebTask(task).score_items(make_encoder()).missing_reason
    changed = make_tasks()["STS"]
    mteb_task = MtebTask(changed)
    score = type(mteb_task).score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MtebTask, "score", lambda self, encoder: {**score(self, encoder), "score": 0.1})
        assert mteb_task.score_items(make_encoder()).missing_reason.endswith("not the score of mteb")


def test_stored_predictions_are_used_again(tmp_path: Path) -> None:
    task = MtebTask(make_tasks()["STS"], tmp_path / "results")
    encoder = make_encoder()
    first = task.score_items(encoder)
    encoder.encode_with_prompt = lambda *_: pytest.fail("encoded again")
    again = task.score_items(encoder)
    assert again.parts[0].score == first.parts[0].score
    assert again.summary["score"] == task.score(encoder)["score"] == pytest.approx(first.summary["score"], abs=1e-6)  # rounded
    for path in [path for path in tmp_path.rglob("*.json*") if path.name != "model_meta.json"]:  # as a full disk leaves them
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        task.score_items(encoder)
    assert [path.name for path in tmp_path.rglob("*.json*")] == ["model_meta.json"]
    other = make_encoder(8.0)  # its predictions lie elsewhere
    assert task.score_items(other).parts[0].score < first.parts[0].score


def test_texts_of_tasks_are_listed() -> None:
    from mteb import mocks

    tasks = {kind: MtebTask(task) for kind, task in make_tasks().items()}
    counts = {kind: [(role, len(texts)) for role, texts in task.list_texts()] for kind, task in tasks.items()}
    assert counts == {
        "Retrieval": [("queries", 60), ("documents", 60)] * 2,
        "STS": [("texts", 60)] * 2,
        "Classification": [("texts", 30)],
        "PairClassification": [("texts", 60)] * 2,
        "Clustering": [("texts", 40)],
        "SampledClustering": [("texts", 60)] * 2,
        "BitextMining": [("texts", 60)] * 4,
        "Summarization": [("texts", 60), ("texts", 60), ("texts", 240)],
    }
    labeled = mocks.MockClassificationTask()
    labeled.label_column_name = "intent"
    rows = [{"text": "a text", "label": 0, "label_text": "a name", "intent": "an intent"}]
    task = MtebTask(with_data(labeled, DatasetDict({"test": Dataset.from_list(rows)})))
    assert list(task.list_texts()) == [("texts", ["a text"])]
    (_, queries), (_, documents), *_ = tasks["Retrieval"].list_texts()
    assert documents[0].startswith(queries[0]) and set(documents[0].split()) <= set(WORDS)
