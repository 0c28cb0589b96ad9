"""An LLM server as a judge of pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.llm_server import MODEL, Behavior, run_llm_server
from jaxembed import curate as curate_command
from jaxembed.config.curation_models import JudgeConfig
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.synthesis.server_judge import SCORE_WITHOUT_ANSWER, open_server_judge

PAIRS = [("what is red", "a red stone"), ("what is red", "the blue sea"), ("what is red", "silence")]


def answer(body: Mapping[str, Any]) -> str:
    """Answer yes if the document has the last word of the query."""
    text = body["messages"][-1]["content"]
    return "I cannot say." if "silence" in text else "yes" if "red stone" in text else "no"


def test_scores_are_probabilities_of_yes_and_each_pair_is_sent_once(tmp_path: Path) -> None:
    with run_llm_server(Behavior(write=answer, gives_logprobs=False)) as server:
        config = JudgeConfig(kind="server", model=MODEL, url=server.url)
        score = open_server_judge(config, tmp_path)
        assert score(PAIRS).tolist() == [1, 0, SCORE_WITHOUT_ANSWER]
    assert open_server_judge(config, tmp_path)(PAIRS[:1]).tolist() == [1], "judges with the same settings share their answers"
    assert score(PAIRS[::-1]).tolist() == [SCORE_WITHOUT_ANSWER, 0, 1]  # the server is gone


def test_probabilities_of_the_server_are_used(tmp_path: Path) -> None:
    """The server gives its answer a log-probability of -0.1; the other one is not among its tokens."""
    with run_llm_server(Behavior(write=answer)) as server:
        config = JudgeConfig(kind="server", model=MODEL, url=server.url, answers=("yes", "0"))
        scores = open_server_judge(config, tmp_path)(PAIRS[:1])
    assert scores[0] == pytest.approx(math.exp(-0.1) / (math.exp(-0.1) + math.exp(-2.4)))


def test_the_step_uses_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "what is red", "pos": ["a red stone", "the blue sea"]}])
    with run_llm_server(Behavior(write=answer, gives_logprobs=False)) as server:
        judge = {"kind": "server", "model": MODEL, "url": server.url}
        tree = {"out": str(tmp_path / "out"), "sources": [{"path": str(tmp_path / "rows.jsonl")}],
                "steps": [{"name": "judge", "judge": judge, "min_positive": 0.5}]}  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        curate_command.main(curate_command.make_parser().parse_args([str(tmp_path / "config.yaml")]))
    row = json.loads((tmp_path / "out" / "rows.jsonl").read_text())
    assert row == {"query": "what is red", "pos": ["a red stone"], "pos_scores": [1.0]}


def test_a_url_belongs_to_a_server() -> None:
    with pytest.raises(ValueError, match=r"kind is 'server': set the url of the server"):
        JudgeConfig(kind="server", model="m")
    with pytest.raises(ValueError, match=r"kind is 'causal_lm': only server reads url"):
        JudgeConfig(kind="causal_lm", model="m", url="http://localhost")


def test_a_server_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    score = open_server_judge(JudgeConfig(kind="server", model="m", url="http://127.0.0.1:9"), tmp_path)
    with pytest.raises(UserError, match=r"127.0.0.1:9"):
        score(PAIRS[:1])
