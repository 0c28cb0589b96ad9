"""The step `decontaminate`: texts of evaluation sets in training rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.curation import pair, queries_left
from jaxembed.config.curation import DecontaminateStepConfig
from jaxembed.curate import read_task
from jaxembed.curation.steps.curated_row import CuratedRow, StepOutcome
from jaxembed.curation.steps.decontamination import make_decontaminate_step
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.evaluation import mteb_catalog, mteb_texts

QUESTION = "Which planet of the solar system has the most moons that were found so far by astronomers?"
PASSAGE = "Saturn has more moons than any other planet: 145 of them were confirmed by 2023, ahead of Jupiter with 95 moons."


def write_beir(folder: Path) -> str:
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": "d", "title": "Moons", "text": PASSAGE}, {"_id": "e", "text": "Short one"}])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": QUESTION}, {"_id": "unused", "text": "Nobody judged this"}])
    (folder / "qrels" / "test.tsv").write_text("q\td\t1\n")
    return str(folder)


def decontaminate(rows: Sequence[CuratedRow], folder: Path, **options: Any) -> list[StepOutcome]:
    tasks = {"Task": [("queries", ["What is a task?"]), ("texts", ["Neither query nor document"])]}
    step, _ = make_decontaminate_step(DecontaminateStepConfig(**options), folder, tasks.__getitem__)
    return step(rows)


def test_texts_of_evaluation_sets_are_dropped_with_their_rows(tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "beir")
    rows = [
        pair(f" {QUESTION.upper()}", "unlike"),
        pair("A question", f"Wikipedia says: {PASSAGE.lower()} Really", "unlike"),
        pair("A question", "short  ONE", neg=["fine"]),
        pair("A question", "unlike", neg=[f"Moons {PASSAGE}", "fine"]),
        pair("nobody judged this", "which planet of the solar system has the most moons"),
    ]
    outcomes = decontaminate(rows, tmp_path, beir=[beir])
    assert [outcome.reasons for outcome in outcomes] == [
        (f"query: equal to a text of {beir}",),
        (f"positives: shares 13 words with a text of {beir}",),
        (f"positives: equal to a text of {beir}",),
        (f"negatives: equal to a text of {beir}",),
        (),
    ]
    assert [outcome.row and [*outcome.row["pos"], *outcome.row["neg"]] for outcome in outcomes] == [
        None, ["unlike"], None, ["unlike", "fine"], rows[4].fields["pos"]
    ]  # fmt: skip


def test_parts_sides_and_rules_are_chosen(tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "beir")
    rows = [pair(QUESTION, "unlike"), pair("A question", PASSAGE), pair("short one", "unlike")]
    kept = [
        [i for i, outcome in enumerate(decontaminate(rows, tmp_path, beir=[beir], **options)) if outcome.row is not None]
        for options in (
            {}, {"parts": ["queries"]}, {"parts": ["documents"]}, {"sides": ["positives"]}, {"ngram_words": None},
            {"ngram_words": None, "bm25_threshold": 0.8},
        )
    ]  # fmt: skip
    assert kept == [[], [1, 2], [0], [0, 2], [1], []]


def test_evaluation_sets_are_files_and_tasks_too(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sts.jsonl", [{"sentence1": "one text", "sentence2": "another text", "score": 3}])
    texts = ["What is a task?", "neither query nor document", "one text", "Another text", "unlike"]
    outcomes = decontaminate(
        [pair(text, "p") for text in texts], tmp_path, tasks=["Task"], files=[str(tmp_path / "sts.jsonl")], parts=["documents"]
    )
    assert queries_left(outcomes) == ["What is a task?", "unlike"]


def test_an_evaluation_set_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for options, message in [
        ({"beir": [str(tmp_path / "absent")]}, "absent/corpus.jsonl: no such file"),
        ({"files": [str(tmp_path / "absent.jsonl")]}, r"absent.jsonl: no such file or folder"),
        ({"files": [str(tmp_path / "empty")]}, "no data files"),
    ]:
        with pytest.raises(UserError, match=message):
            decontaminate([], tmp_path, **options)
    write_jsonl(tmp_path / "labels.jsonl", [{"text": "some text", "label": "x"}])
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "q", "pos": ["p"]}])
    decontaminate([], tmp_path, files=[str(tmp_path / "labels.jsonl")], parts=["documents"])


def test_the_command_reads_the_texts_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_catalog, "find_tasks", lambda names, benchmarks, languages: [(name, ()) for name in names])
    monkeypatch.setattr(mteb_texts, "list_task_texts", lambda task: [("queries", [f"a query of {task}"])])
    step, digest = make_decontaminate_step(DecontaminateStepConfig(tasks=["A"]), tmp_path, read_task)
    assert queries_left(step([pair("A query of A", "p"), pair("a query of B", "p")])) == ["a query of B"]
    assert digest != make_decontaminate_step(DecontaminateStepConfig(tasks=["B"]), tmp_path, read_task).digest
