"""Causal language models as judges, compared with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from helpers import tiny
from jaxembed.config.curation_models import JudgeConfig
from jaxembed.errors import UserError
from jaxembed.hub.causal_judge import open_causal_judge

PAIRS = [("what is red", "a red stone"), ("what is blue", "the sea " * 3), ("x", "y")]
KEYS = {
    "kind": "causal_lm",
    "answers": ("a", "b"),
    "template": "{instruction}: {query} | {document} Answer:",
    "instruction": "I",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("judge"), "qwen3", head=True)


def test_scores_equal_those_of_transformers_and_are_stored(folder: Path, tmp_path: Path) -> None:
    score = open_causal_judge(JudgeConfig(model=str(folder), **KEYS), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["a", "b"])
    expected = []
    for query, document in PAIRS:
        inputs = tokenizer(f"I: {query} | {document} Answer:", return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"]).logits[0, -1, ids]
        expected.append(float(torch.softmax(logits, 0)[0]))
    scores = score(PAIRS)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3
    assert score(PAIRS[::-1]).tolist() == scores[::-1].tolist() and len(list(tmp_path.rglob("vectors-v2"))) == 1


def test_long_texts_are_truncated_and_keep_the_end_of_the_template(folder: Path, tmp_path: Path) -> None:
    """The documents differ only beyond the limit, so their scores are equal."""
    score = open_causal_judge(JudgeConfig(model=str(folder), max_length=40, **KEYS), tmp_path)
    query = "why " * 100
    first, second, other = score([(query, "red " * 100), (query, "red " * 90 + "blue"), (query, "b")])
    assert first == second != other


def test_models_that_cannot_judge_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'maybe' is not one token of its tokenizer. Set answers to two tokens"):
        open_causal_judge(JudgeConfig(model=str(folder), **{**KEYS, "answers": ("a", "maybe")}), tmp_path)
    headless = tiny.write_folder(tmp_path / "headless", "qwen3")
    with pytest.raises(UserError, match=r"headless: has no lm_head\.weight, the head of a language model"):
        open_causal_judge(JudgeConfig(model=str(headless), **KEYS), tmp_path)
