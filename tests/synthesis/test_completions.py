"""Answers of servers that do not keep to the API: malformed, endless, slow, or with numbers that are none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.llm_server import Behavior, LlmServer
from jaxembed.errors import UserError
from jaxembed.synthesis import completions, endpoints
from jaxembed.synthesis.completions import read_chat, read_echo, read_json_answer

from .conftest import Synthesize

MESSAGE = {"role": "assistant", "content": "fine"}
CHAT: dict[str, Any] = {"model": "m", "choices": [{"message": MESSAGE, "finish_reason": "stop"}], "usage": None}


def chat(**changes: Any) -> dict[str, Any]:
    """Return a chat completion with changes to its choice."""
    return CHAT | {"choices": [CHAT["choices"][0] | changes]}


@pytest.mark.parametrize(
    "content",
    [
        None, [], "<html>", 3, {}, {"choices": []}, {"choices": [None]}, {"choices": {"0": 1}}, chat(message=None),
        chat(message={"content": ["fine"]}), chat(finish_reason=3), chat(logprobs=[1]), chat(logprobs={"content": [1]}),
        chat(logprobs={"content": [{"top_logprobs": [{"token": 1, "logprob": -1}]}]}), CHAT | {"model": 7},
        CHAT | {"usage": {"prompt_tokens": "many"}}, CHAT | {"usage": {"completion_tokens": -5}},
        CHAT | {"usage": {"prompt_tokens": 10**400}}, CHAT | {"usage": [1]},
    ],
)  # fmt: skip
def test_malformed_answers_raise_an_error_after_which_they_are_asked_again(content: Any) -> None:
    with pytest.raises(ValueError, match="the answer is not a completion"):
        read_chat(content)


def test_numbers_that_are_no_log_probabilities_are_left_out() -> None:
    values = {"a": -0.5, "b": math.nan, "c": -math.inf, "d": "x", "e": 7.0, "f": None, "g": True}
    tops = [{"token": token, "logprob": value} for token, value in values.items()]
    assert read_chat(chat(logprobs={"content": [{"top_logprobs": tops}]})).logprobs == {"a": -0.5}
    echo = {"choices": [{"logprobs": {"text_offset": [0, 2, 4], "token_logprobs": [None, -1.0, math.nan]}}]}
    tokens = read_echo(echo)[1]
    assert tokens[2] == -1.0 and math.isnan(tokens[4]) and len(tokens) == 2
    assert read_chat(CHAT | {"model": "half \ud83d"}).model == "half ?"


class EndlessResponse:
    """A response that never ends."""

    def iter_bytes(self, size: int) -> Iterator[bytes]:
        while True:
            yield b" " * 10


def test_endless_and_slow_answers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MAX_COMPLETION_BYTES", 1000)
    with pytest.raises(ValueError, match="the answer is longer than 1,000 bytes"):
        read_json_answer(EndlessResponse(), 1e9)
    with pytest.raises(ValueError, match="the answer did not end within 0 s"):
        read_json_answer(EndlessResponse(), 0.0)


@pytest.mark.parametrize("content", [{"choices": [{"message": "no"}]}, {"usage": {"prompt_tokens": "x"}}, [], None])
def test_a_server_that_answers_nothing_else_is_one_line(
    synthesize: Synthesize, server: LlmServer, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.setattr(endpoints, "MAX_ATTEMPTS", 2)
    server.behavior = Behavior(change=lambda answer: answer | content if isinstance(content, dict) else content)
    with pytest.raises(UserError, match="failed 2 times in a row, the last time with: the answer is not a completion"):
        synthesize("--max-rows=2")


def test_a_name_that_no_file_can_hold_does_not_end_a_run(synthesize: Synthesize, server: LlmServer, tmp_path: Path) -> None:
    server.behavior = Behavior(change=lambda answer: answer | {"model": "half \ud83d"})
    synthesize("--max-rows=2")
    origin = json.loads((tmp_path / "out/provenance/search.jsonl").read_text().splitlines()[0])
    assert origin["model"] == "half ?"
