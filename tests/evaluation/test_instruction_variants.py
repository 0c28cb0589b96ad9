"""Tasks under paraphrased, wrong and missing instructions."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers.held_out import encode_words, make_scored_pairs, write_beir, write_rows
from jaxembed import evaluate
from jaxembed.config.instructions import InstructionTable
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.evaluation.instruction_variants import add_variants
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.user_data import open_tasks

NOISE = {"Do: usual\n": 0.0, "Do: alike\n": 0.0, "Do: near\n": 1.0, "Do: other\n": 8.0, "": 3.0, "doc: ": 0.0}


def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
    return encode_words(texts, noise=NOISE[prompt])


def make_encoder() -> TaskEncoder:
    prompts = {"query": "Do: usual\n", "document": "doc: "}
    return TaskEncoder(encode, EmbeddingSpec(instruction_template="Do: {instruction}\n", prompts=prompts), "x", "1")


def write_variants(folder: Path, content: object) -> str:
    (folder / "variants.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "variants.yaml")


def test_instructions_are_compared_by_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxembed")
    write_beir(tmp_path / "bank", count=60)
    tasks = open_tasks(evaluate.make_parser().parse_args(["x", "--beir", str(tmp_path / "bank")]))
    path = write_variants(tmp_path, {"bank": {"paraphrased": ["alike", "near"], "wrong": ["other"]}})
    [task] = add_variants(tasks, path)
    encoder = make_encoder()
    usual_prompts = encoder.prompts
    summary = task.score(encoder)
    assert encoder.prompts is usual_prompts
    found = summary["instruction_variants"]
    assert [(v["kind"], v["instruction"]) for v in found["variants"]] == [
        ("chosen", "usual"), ("paraphrased", "alike"), ("paraphrased", "near"), ("wrong", "other"), ("missing", ""),
    ]  # fmt: skip
    usual, alike, near, other, missing = (variant["score"] for variant in found["variants"])
    assert usual == alike == summary["score"] == tasks[0].score(encoder)["score"] > near > missing > other
    assert [v["difference"] for v in found["variants"]] == [0, 0, near - usual, other - usual, missing - usual]
    assert found["spread"] == {
        "all": usual - other,
        "by_kind": {
            "paraphrased": {"mean": pytest.approx((usual + near) / 2), "spread": usual - near},
            "wrong": {"mean": other, "spread": usual - other},
            "missing": {"mean": missing, "spread": usual - missing},
        },
    }
    assert f"bank: mean score by kind of instruction: paraphrased {(usual + near) / 2:.4f}, wrong {other:.4f}" in caplog.text
    items = task.score_items(encoder)
    assert items.parts and items.summary == summary
    assert list(task.list_texts()) == list(tasks[0].list_texts()) and task.expected_texts == 5 * 120


def test_tasks_of_mteb_have_variants_too(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict
    from mteb.mocks import MockSTSTask

    from jaxembed.evaluation.mteb_tasks import MtebTask

    task = MockSTSTask()
    task.dataset, task.data_loaded = DatasetDict({"test": Dataset.from_list(make_scored_pairs(60))}), True
    path = write_variants(tmp_path, {"MockSTSTask": ["usual", "other"]})
    [with_variants] = add_variants([MtebTask(task, tmp_path / "results")], path)
    for _ in range(2):  # the second time from stored results, which differ by instruction
        found = with_variants.score(TaskEncoder(lambda texts, prompt: encode_words(texts, noise=NOISE.get(prompt, 1.0)),
                                                make_encoder().spec, "x", "1"))  # fmt: skip
        usual, other, missing = (v["score"] for v in found["instruction_variants"]["variants"][1:])
        assert usual > missing > other


def test_documents_of_a_symmetric_task_have_the_other_instructions_too(tmp_path: Path) -> None:
    write_beir(tmp_path / "bank", count=8)
    tasks = open_tasks(evaluate.make_parser().parse_args(["x", "--beir", str(tmp_path / "bank")]))
    [task] = add_variants(tasks, write_variants(tmp_path, {"bank": ["alike"]}))
    prompts: list[str] = []

    def encode_and_record(texts: Sequence[str], prompt: str) -> np.ndarray:
        prompts.append(prompt)
        return encode(texts, prompt)

    encoder = dataclasses.replace(make_encoder(), encode_with_prompt=encode_and_record)
    encoder.use_instructions(InstructionTable(by_task={"bank": "usual"}, symmetric=("bank",)), "own.yaml")
    task.score(encoder)
    assert prompts == ["Do: usual\n"] * 2 + ["Do: alike\n"] * 2 + [""] * 2


def test_mistakes_in_the_file_are_one_line(tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", make_scored_pairs(8))
    tasks = open_tasks(evaluate.make_parser().parse_args(["x", "--sts", str(pairs)]))
    for content, problem in (
        ({"pair": ["a"]}, r"pair is not a task of this command \(tasks: pairs\)\. Did you mean 'pairs'\?$"),
        ({"pairs": "a"}, r"pairs: expected a list of instructions, or such lists by kind"),
        ({"pairs": {"wrong": [""]}}, r"pairs: expected a list of instructions"),
        ({"pairs": {"missing": ["a"]}}, r"pairs: the kind 'missing' is always scored\. Remove it\."),
    ):
        with pytest.raises(UserError, match=rf"variants\.yaml: {problem}"):
            add_variants(tasks, write_variants(tmp_path, content))
