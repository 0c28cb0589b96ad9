"""`evaluate` on files of a user: scores, the comparison of two models, leaks, and errors of one line."""

from __future__ import annotations

import functools
import json
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.held_out import encode_words, make_labeled_texts, make_scored_pairs, write_beir, write_rows
from jaxembed import evaluate
from jaxembed.config.instructions import InstructionTable
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import Stopped, UserError
from jaxembed.evaluation import evaluate as evaluation
from jaxembed.evaluation.bootstrap import CONFIDENCE
from jaxembed.evaluation.comparison import VERDICTS, describe_conclusion
from jaxembed.evaluation.heldout import open_held_out_sets, score_set
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.user_data import UserTask, name_tasks, open_tasks
from jaxembed.files import lock_folder

NOISE = {"good": 0.0, "poor": 6.0, "copy": 0.0}  # of the vectors of stand-ins for models


def load_words(model: str, **_: Any) -> TaskEncoder:
    return TaskEncoder(
        functools.partial(encode_words, noise=NOISE[model]),
        EmbeddingSpec(),
        model,
        model,
        width=encode_words(["a"], "").shape[1],
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of each kind. Stand-ins for models are loaded by name."""
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "load_encoder", load_words)
    monkeypatch.setattr(evaluation, "check_compared_model", lambda *_: None)
    monkeypatch.setattr(evaluation, "choose_widths", lambda *_: (8, ()))
    write_beir(tmp_path / "bank", count=60)
    write_rows(tmp_path / "pairs.jsonl", make_scored_pairs(80))
    write_rows(tmp_path / "topics.jsonl", make_labeled_texts(60, seed=0))
    return tmp_path


def run(*arguments: str) -> dict[str, Any]:
    return dict(evaluate.evaluate(evaluate.make_parser().parse_args([*arguments])))


def test_files_of_the_user_are_scored(folder: Path) -> None:
    result = run("good", "--beir", "bank/", "--sts", "pairs.jsonl", "--labels", "topics.jsonl", "--out", "out")
    scores = result["scores"]
    assert {name: (s["type"], s["metric"]) for name, s in scores.items()} == {
        "bank": ("Retrieval", "ndcg_at_10"),
        "pairs": ("STS", "spearman"),
        "topics-classification": ("Classification", "accuracy"),
        "topics-clustering": ("Clustering", "v_measure"),
    }
    sets = {task.name: task.held_out for task in open_tasks(evaluate.make_parser().parse_args(["x", "--beir", "bank"]))}
    expected = score_set(sets["bank"], encode_words)
    assert scores["bank"]["metrics"] == pytest.approx(expected.scores)
    assert scores["bank"]["score"] == scores["bank"]["splits"]["default"] == pytest.approx(expected.scores["ndcg_at_10"])
    assert scores["bank"]["bm25"]["ndcg_at_10"] > 0.3
    assert all(0.1 < s["score"] <= 1 for s in scores.values())
    assert json.loads((folder / "out" / "scores.json").read_text())["pairs"] == scores["pairs"]


def test_two_processes_do_not_write_one_output(folder: Path) -> None:
    """Each would replace the scores of the other."""
    (folder / "out").mkdir()
    with lock_folder(folder / "out", folder / "out"), pytest.raises(UserError, match=r"^out: another process is writing it"):
        run("good", "--sts", "pairs.jsonl", "--out", "out")
    run("good", "--sts", "pairs.jsonl", "--out", "out")


@pytest.mark.parametrize(
    ("options", "line"),
    [(["--out", "out"], "out keeps the scores of finished tasks; the same command continues"), ([], "nothing was written")],
)
def test_a_signal_says_what_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], line: str) -> None:
    def stop(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(evaluation, "score_tasks", stop)
    arguments = ["good", "--sts", "pairs.jsonl", "--backend", "sentence-transformers", *options]
    with pytest.raises(Stopped, match=f"^{line}$"):
        evaluate.main(evaluate.make_parser().parse_args(arguments))


def test_an_interrupted_run_leaves_no_vectors_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_and_stop(texts: Sequence[str], prompt: str) -> np.ndarray:
        if found := list(folder.glob("temporary/*/*.partial")):
            raise KeyboardInterrupt(len(found))
        return encode_words(texts)

    (folder / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "temporary"))
    width = encode_words(["a"], "").shape[1]
    monkeypatch.setattr(
        evaluation, "load_encoder", lambda model, **_: TaskEncoder(encode_and_stop, EmbeddingSpec(), model, model, width=width)
    )
    with pytest.raises(KeyboardInterrupt):
        run("good", "--sts", "pairs.jsonl", "--vector-memory", "0")
    assert list((folder / "temporary").iterdir()) == []


def test_texts_get_the_prompts_of_the_model(folder: Path) -> None:
    prompts: list[tuple[str, str]] = []

    def encode(texts: Any, prompt: str) -> np.ndarray:
        prompts.append((texts[0], prompt))
        return encode_words(texts)

    spec = EmbeddingSpec(instruction_template="Do: {instruction}\n", prompts={"query": "Do: find\n", "document": "doc: "})
    arguments = ["x", "--beir", "bank", "--sts", "pairs.jsonl", "--labels", "topics.jsonl"]
    tasks = open_tasks(evaluate.make_parser().parse_args(arguments))
    instructions = [task.score(TaskEncoder(encode, spec, "x", "1"))["instruction"] for task in tasks]
    sts = "Retrieve semantically similar text."
    assert instructions == ["find", sts, "Classify user passages.", "Identify categories in user passages."]
    assert [prompt for _, prompt in prompts] == ["Do: find\n", "doc: ", *(f"Do: {i}\n" for i in (sts, *instructions[1:]))]
    prompts.clear()
    plain = [task.score(TaskEncoder(encode, EmbeddingSpec(), "x", "1"))["instruction"] for task in tasks]
    assert set(plain) == {""} and {prompt for _, prompt in prompts} == {""}


def test_models_are_compared_on_the_same_items(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxembed")
    files = ["--beir", "bank", "--sts", "pairs.jsonl", "--labels", "topics.jsonl"]
    result = run("good", *files, "--compare", "poor", "--out", "out")
    comparison = result["comparison"]
    assert comparison["model"] == "poor" and comparison["scores"].keys() == result["scores"].keys()
    for task, found in comparison["differences"].items():
        low, high = found["interval"]
        assert found["difference"] == pytest.approx(result["scores"][task]["score"] - comparison["scores"][task]["score"])
        assert 0 < low < found["difference"] < high and found["verdict"] == "better" and found["p"] < 1 - CONFIDENCE
    assert (comparison["differences"]["bank"]["queries"], comparison["differences"]["pairs"]["pairs"]) == (60, 80)
    assert comparison["mean"]["verdict"] == "better"
    names = "bank, pairs, topics-classification, topics-clustering"
    assert comparison["conclusion"] == f"good is better than poor on {names}." == caplog.messages[-1]
    assert json.loads((folder / "out" / "comparison.json").read_text()) == comparison
    assert run("poor", *files, "--compare", "good")["comparison"]["conclusion"] == f"poor is worse than good on {names}."


def test_a_comparison_names_the_tasks_of_every_verdict() -> None:
    differences = {task: {"verdict": verdict} for task, verdict in zip("abc", VERDICTS, strict=True)}
    expected = "new is better than old on a, and worse on b. No difference is shown on c."
    assert describe_conclusion(("new", "old"), differences) == expected
    assert describe_conclusion(("new", "old"), {"c": differences["c"]}) == "No difference between new and old is shown."


def test_equal_models_show_no_difference(folder: Path) -> None:
    comparison = run("good", "--beir", "bank", "--compare", "copy")["comparison"]
    assert comparison["differences"]["bank"] == {
        "difference": 0, "interval": [0, 0], "p": 1, "verdict": "no difference shown", "queries": 60
    }  # fmt: skip
    assert comparison["conclusion"] == "No difference between good and copy is shown."


def test_files_that_were_scored_are_not_scored_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--beir", "bank", "--sts", "pairs.jsonl", "--labels", "topics.jsonl", "--out", "out"]
    first = run("good", *options)
    score_items, scored = UserTask.score_items, list[str]()
    monkeypatch.setattr(UserTask, "score_items", lambda self, encoder: scored.append(self.name) or score_items(self, encoder))
    assert run("good", *options) == first and not scored
    assert run("poor", *options)["scores"] != first["scores"] and len(scored) == 4
    signs = run("good", *options, "--precision", "binary")["scores"]
    assert signs["pairs"]["score"] != first["scores"]["pairs"]["score"] and len(scored) == 8
    compared = run("good", *options, "--compare", "poor")
    assert len(scored) == 16, "their items were not needed before"
    assert run("good", *options, "--compare", "poor") == compared and len(scored) == 16
    write_rows(folder / "pairs.jsonl", make_scored_pairs(81))
    assert run("good", *options)["scores"]["bank"] == first["scores"]["bank"]
    assert scored[16:] == ["pairs"], "its file has changed"


def test_a_model_to_compare_with_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "load_encoder", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^nowhere: "):
        run("x", "--beir", "bank", "--compare", "nowhere")
    with pytest.raises(UserError, match=r"^empty: not a sentence-transformers folder"):
        run("x", "--beir", "bank", "--compare", "empty", "--backend", "sentence-transformers")


def test_a_model_to_compare_with_must_have_the_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "load_encoder", lambda *_, **__: pytest.fail("loaded"))
    base = tiny.write_folder(tmp_path / "base", "qwen3")
    with pytest.raises(UserError, match=r"^--dim: 64 is above the width of .+ \(32\)"):
        run("x", "--beir", "bank", "--compare", str(base), "--dim", "64")


def test_mistakes_in_the_options_are_one_line(folder: Path) -> None:
    for arguments, problem in (
        (["--labels", "topics.jsonl", "--train-labels", "a", "b"], r"^--train-labels: 2 files \(expected 1, one for each file"),
        (["--sts", "topics.jsonl"], r'topics.jsonl:1: "sentence1" is missing'),
        (["--beir", "nowhere"], r"^evaluate: nowhere: no such file or folder 'nowhere'\."),
        (["--sts", "pairs.jsonl", "--beir", "bank", "bank"], r"^evaluate: two tasks are named 'bank'\."),
        (["--sts", "pairs.jsonl", "--check-leaks", "bank"], r"^--check-leaks: bank is not a run directory \(expected a run or"),
        (["--sts", "pairs.jsonl", "--check-leaks", "no.yaml"], r"^no.yaml: no such config file"),
        ([], r"^evaluate: no tasks to score"),
    ):
        with pytest.raises(UserError, match=problem):
            run("good", *arguments)


def test_leaks_are_counted_by_task_role_and_source(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxembed")
    corpus = [json.loads(line)["text"] for line in (folder / "bank" / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line)["text"] for line in (folder / "bank" / "queries.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    write_rows(folder / "clean.jsonl", [{"query": "nothing of it", "pos": ["at all"]}, {"query": "or of that", "pos": ["x"]}])
    leaked = [
        {"query": queries[0].upper(), "pos": [f"see {corpus[1]} there"], "neg": [corpus[2]]},
        {"query": "q", "pos": [pairs[0]["sentence1"]]},
    ]
    write_rows(folder / "leaky.jsonl", leaked)
    (folder / "train.yaml").write_text("model: {base: x}\ndata: {sources: [{path: clean.jsonl}, {path: leaky.jsonl}]}\n")
    arguments = ["--beir", "bank", "--sts", "pairs.jsonl", "--check-leaks", "train.yaml", "--leak-words", "5", "--out", "out"]
    leaks = run("good", *arguments)["leaks"]
    exact_queries = sum(query == queries[0] for query in queries)
    assert leaks["bank"]["roles"] == [
        {"role": "queries", "texts": 60, "exact": exact_queries, "ngram": 0},
        {"role": "documents", "texts": 60, "exact": 1, "ngram": 1},
    ]
    assert (leaks["bank"]["texts"], leaks["bank"]["exact"], leaks["bank"]["ngram"]) == (120, exact_queries + 1, 1)
    assert leaks["bank"]["sources"] == {"leaky": {"exact": exact_queries + 1, "ngram": 1}}
    [pair_texts] = leaks["pairs"]["roles"]
    assert (pair_texts["role"], pair_texts["texts"]) == ("texts", 160)
    assert leaks["pairs"]["exact"] == pair_texts["exact"] >= 1 and leaks["pairs"]["sources"].keys() == {"leaky"}
    [shown] = [example for example in leaks["bank"]["examples"] if example["rule"] == "ngram"]
    assert shown == {
        "rule": "ngram", "role": "documents", "text": corpus[1], "source": "leaky",
        "training_text": f"see {corpus[1]} there", "words": corpus[1],
    }  # fmt: skip
    assert json.loads((folder / "out" / "leaks.json").read_text()) == leaks
    assert f"leaks: bank: {exact_queries} of 60 queries equal a training text, 0 more share 5 words; 1 of 60" in caplog.text
    assert run("good", *arguments[:4], "--check-leaks", "train.yaml")["leaks"]["bank"]["ngram"] == 0, "13 words by default"


def test_files_with_equal_names_are_named_after_their_folders() -> None:
    assert name_tasks(["a/test.jsonl", "b/test.tsv", "c/bank/", "hf:glue:test"]) == {
        "a/test.jsonl": "a/test", "b/test.tsv": "b/test", "c/bank/": "bank", "hf:glue:test": "hf:glue:test"
    }  # fmt: skip


def test_leaks_of_a_classifiers_training_texts_do_not_count(tmp_path: Path) -> None:
    rows = make_labeled_texts(20, seed=0)
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", rows[:10])
    arguments = evaluate.make_parser().parse_args(["x", "--labels", str(test), "--train-labels", str(train)])
    tasks: list[UserTask] = open_tasks(arguments)
    assert [(role, len(texts)) for role, texts in tasks[0].list_texts()] == [("texts", 10)]
    assert tasks[0].expected_texts == 30 and open_held_out_sets([tasks[0].held_out.config], tmp_path)


def test_every_width_and_a_table_of_instructions_count(folder: Path) -> None:
    tasks = open_tasks(evaluate.make_parser().parse_args(["x", "--beir", "bank", "--sts", "pairs.jsonl"]))
    prompts = []

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        prompts.append(prompt)
        return encode_words(texts)

    spec = EmbeddingSpec(prompts={"query": "Instruct: stored\nQuery:", "document": "d: "})
    encoder = TaskEncoder(encode, spec, "model", "1", width=32, widths=(32, 4))
    retrieval, similarity = (task.score(encoder) for task in tasks)
    for result in (retrieval, similarity):
        assert list(result["widths"]) == ["32", "4"] and result["widths"]["32"] == result["score"] > result["widths"]["4"]
    assert retrieval["instruction"] == "stored" and set(prompts) == {
        "Instruct: stored\nQuery:", "d: ", "Instruct: Retrieve semantically similar text.\nQuery:"
    }  # fmt: skip
    encoder.precisions = ("binary", "float32")
    for task, result in zip(tasks, (retrieval, similarity), strict=True):
        precisions = task.score(encoder)["precisions"]
        assert precisions["float32"] == result["score"] != precisions["binary"]
    encoder.use_instructions(InstructionTable(by_task={"bank": "own"}), "own.yaml")
    assert [task.score(encoder)["instruction"] for task in tasks] == ["own", "Retrieve semantically similar text."]
