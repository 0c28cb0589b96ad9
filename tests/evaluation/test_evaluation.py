"""Retrieval metrics against trec_eval, held-out sets, and the mteb encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytrec_eval

from helpers import tiny
from jaxembed import Embedder
from jaxembed.config import EvalSetConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.evaluation.encoders import load_encoder
from jaxembed.evaluation.heldout import open_held_out_sets, score_sets
from jaxembed.evaluation.mteb_encoder import MtebEncoder
from jaxembed.evaluation.mteb_results import summarize_task
from jaxembed.evaluation.mteb_tasks import MtebTask
from jaxembed.evaluation.retrieval import average_precision, ndcg, recall, reciprocal_rank
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.tasks import score_tasks
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.spec_files import write_spec


def test_metrics_equal_trec_eval() -> None:
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(40)[:10] for _ in range(30)])
    relevant = [
        {int(d): int(rng.integers(1, 4)) for d in rng.choice(40, rng.integers(1, 15), replace=False)} for _ in range(30)
    ]
    qrels = {str(i): {str(d): g for d, g in grades.items()} for i, grades in enumerate(relevant)}
    runs = {str(i): {str(d): 100.0 - k for k, d in enumerate(rows)} for i, rows in enumerate(ranked)}
    metrics = {"ndcg_cut_10": ndcg, "recall_10": recall, "recip_rank": reciprocal_rank, "map_cut_10": average_precision}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "recip_rank", "map_cut.10"})
    theirs = evaluator.evaluate(runs).values()
    for name, metric in metrics.items():
        assert metric(relevant, ranked) == pytest.approx([scores[name] for scores in theirs], abs=1e-9)


def write_beir_folder(folder: Path) -> Path:
    """Write a BEIR folder whose queries are its documents."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(tiny.TEXTS)]
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(tiny.TEXTS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    lines = [f"q{i}\td{i}\t1" for i in range(len(tiny.TEXTS))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def test_held_out_sets_score_a_model(tmp_path: Path) -> None:
    pairs = [{"sentence1": t, "sentence2": t if i % 2 else "short", "score": i % 2} for i, t in enumerate(tiny.TEXTS)]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    configs = [
        EvalSetConfig(name="same", path=str(write_beir_folder(tmp_path / "beir"))),
        EvalSetConfig(name="sts", kind="sts", path=str(tmp_path / "sts.jsonl")),
    ]
    sets = open_held_out_sets(configs, tmp_path)
    model = Embedder.load(tiny.write_folder(tmp_path / "base", "qwen3"))
    scores = score_sets(sets, model.encode)
    assert scores["same/ndcg_at_10"] == scores["same/recall_at_10"] == 1  # every text finds itself
    assert scores["sts/spearman"] > 0.8
    noise = np.random.default_rng(0)
    random = score_sets(sets, lambda texts, instruction: noise.normal(size=(len(texts), 4)).astype(np.float32))
    assert random["sts/spearman"] < 0.8
    assert random["same/ndcg_at_10"] < 0.9


def test_missing_held_out_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.sets: here: no such file or folder '.*nowhere'"):
        open_held_out_sets([EvalSetConfig(name="here", path=str(tmp_path / "nowhere"))], tmp_path)


def test_held_out_set_without_relevant_documents_is_named(tmp_path: Path) -> None:
    qrels = write_beir_folder(tmp_path / "beir") / "qrels" / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n")
    with pytest.raises(UserError, match=r"qrels/test\.tsv: no query has a relevant document \(expected scores above 0\)\.$"):
        open_held_out_sets([EvalSetConfig(name="here", path=str(tmp_path / "beir"))], tmp_path)


def fail_to_connect(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route")


def test_mteb_scores_the_encoder_under_task_instructions(tmp_path: Path) -> None:
    from mteb.mocks import MockRetrievalTask, MockSTSTask

    prompts: list[str] = []

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        prompts.append(prompt)
        return np.random.default_rng(len(texts)).normal(size=(len(texts), 4)).astype(np.float32)

    spec = EmbeddingSpec(prompts={"document": "d: "})
    scores = score_tasks(
        TaskEncoder(encode, spec, "tiny", "1"), [MtebTask(MockRetrievalTask()), MtebTask(MockSTSTask())], tmp_path
    )
    assert set(scores) == {"MockRetrievalTask", "MockSTSTask"}
    for result in scores.values():
        assert "Instruct: {}\nQuery:".format(result["instruction"]) in prompts
    assert "d: " in prompts
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["MockRetrievalTask"] == scores["MockRetrievalTask"]

    unreachable = MockSTSTask()
    unreachable.load_data = fail_to_connect  # as the hub client does without a network
    with pytest.raises(UserError, match=r"MockSTSTask: cannot download its data \(no route\)\. Connect"):
        score_tasks(TaskEncoder(encode, spec, "tiny", "2"), [MtebTask(unreachable)])

    plain = MtebEncoder(TaskEncoder(encode, EmbeddingSpec(), "tiny", "1"))
    assert plain.build_prompt(SimpleNamespace(name="MockSTSTask", type="STS", prompt="x"), None) == ""


def make_task_result(scores: dict[str, dict[str, float]]) -> Any:
    """Make mteb's result of an STS task from main scores by split and subset."""
    from mteb.mocks import MockSTSTask
    from mteb.results import TaskResult

    entries = {
        split: {subset: {"main_score": score, "cosine_spearman": score} for subset, score in subsets.items()}
        for split, subsets in scores.items()
    }
    task = MockSTSTask()
    task.metadata = task.metadata.model_copy(
        update={"eval_langs": {"a": ["eng-Latn"], "b": ["deu-Latn"], "default": ["eng-Latn"]}}
    )
    return TaskResult.from_task_results(task, scores=entries, evaluation_time=1.0)


def test_tasks_with_several_splits_have_the_score_of_mteb() -> None:
    result = make_task_result({"validation": {"a": 0.5, "b": 0.7}, "test": {"a": 0.9, "b": 0.95}})
    summary = summarize_task(result, "Find it")
    assert summary["score"] == pytest.approx(result.get_score()) == pytest.approx((0.5 + 0.7 + 0.9 + 0.95) / 4)
    assert summary["splits"] == {"validation": 0.6, "test": 0.925}
    assert summary["subsets"] == {"a": 0.7, "b": 0.825}
    # The splits may have different subsets.
    uneven = make_task_result({"validation": {"a": 0.5}, "test": {"a": 0.9, "b": 0.1}})
    assert summarize_task(uneven, "")["score"] == pytest.approx(uneven.get_score()) == pytest.approx(0.5)
    single = make_task_result({"test": {"default": 0.25}})
    assert summarize_task(single, "") == {
        "score": 0.25,
        "instruction": "",
        "subsets": {"default": 0.25},
        "splits": {"test": 0.25},
    }


def test_a_score_that_is_not_finite_is_null(caplog: pytest.LogCaptureFixture) -> None:
    summary = summarize_task(make_task_result({"test": {"default": float("nan")}}), "")
    assert (summary["score"], summary["splits"]) == (None, {"test": None})
    json.dumps(summary, allow_nan=False)
    assert "the score is not finite" in caplog.text


def write_runs(root: Path) -> list[Path]:
    """Write three folders named run: two with different weights, and one with another pooling."""
    folders = [root / name / "run" for name in ("seed0", "seed1", "last")]
    for folder, seed in zip(folders, (0, 1, 0), strict=True):
        tiny.write_folder(folder, "qwen3", seed=seed)
        write_spec(folder, EmbeddingSpec(attention="causal", pooling="last" if folder == folders[2] else "mean", max_length=64))
    return folders


def test_cached_scores_belong_to_one_model(tmp_path: Path) -> None:
    """Models of one name share a folder of results. Each is scored; the same model, moved, is not scored again."""
    from mteb.mocks import MockRetrievalTask

    revisions, calls = [], []
    for folder in write_runs(tmp_path):
        encoder = load_encoder(str(folder))
        encode = encoder.encode_with_prompt
        encoder.encode_with_prompt = lambda *args, encode=encode: calls.append(args) or encode(*args)
        before = len(calls)
        score_tasks(encoder, [MtebTask(MockRetrievalTask(), tmp_path / "out")])
        assert len(calls) > before, "not read from the cache of another model"
        revisions.append(encoder.revision)
    assert len(set(revisions)) == 3
    moved = (tmp_path / "elsewhere" / "run").parent
    (tmp_path / "seed0").rename(moved)
    before = len(calls)
    encoder = load_encoder(str(moved / "run"))
    assert encoder.revision == revisions[0]
    encoder.encode_with_prompt = lambda *args: pytest.fail("scored again")
    score_tasks(encoder, [MtebTask(MockRetrievalTask(), tmp_path / "out")])


def test_revision_of_the_torch_backend_covers_the_whole_folder(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path / "base", "qwen3")
    write_spec(tmp_path / "base", EmbeddingSpec(query_suffix=" Response:", max_length=128))
    export(Embedder.load(tmp_path / "base"), tmp_path / "out", "float32", Card("out", "base"))
    torch_encoder = load_encoder(str(tmp_path / "out"), backend="sentence-transformers")
    texts, prompt = ["a question"], "Do: find it\n"  # queries have a suffix
    expected = load_encoder(str(tmp_path / "out")).encode_with_prompt(texts, prompt)
    np.testing.assert_allclose(torch_encoder.encode_with_prompt(texts, prompt), expected, atol=1e-4)
    first = torch_encoder.revision
    pooling = tmp_path / "out" / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace('"include_prompt": true', '"include_prompt": false'))
    assert load_encoder(str(tmp_path / "out"), backend="sentence-transformers").revision != first
