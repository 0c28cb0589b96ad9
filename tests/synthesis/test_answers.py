"""Which answers are valid, their JSON schema, the store, and jobs whose results come in order."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jaxembed.config.synthesis import TaskConfig
from jaxembed.config.synthesis_steps import AnswerConfig, FilterStepConfig, SamplingConfig
from jaxembed.errors import UserError
from jaxembed.synthesis.acceptance import RowRules, find_format
from jaxembed.synthesis.answers import AnswerReader, InvalidAnswerError, drop_limits
from jaxembed.synthesis.drafts import Draft
from jaxembed.synthesis.endpoints import ServerOptions
from jaxembed.synthesis.novelty import SeenTexts, find_language_code, find_language_problem
from jaxembed.synthesis.requests import Answer, Request
from jaxembed.synthesis.steps import FilterStep
from jaxembed.synthesis.store import AnswerStore
from jaxembed.synthesis.workers import Job, TokenBudget, Workers

OBJECT = {
    "type": "object",
    "fields": {
        "query": {"max_chars": 20}, "score": {"type": "number", "minimum": 1, "maximum": 5},
        "label": {"type": "choice", "choices": ["yes", "no", 3]}, "texts": {"type": "list", "max_items": 2},
    },
}  # fmt: skip
GOOD = {"query": " what? ", "score": 2.5, "label": "3", "texts": ["a", "b"]}


def read(config: dict[str, Any], text: str, **answer: Any) -> list[dict[str, Any]]:
    return AnswerReader(AnswerConfig.model_validate(config), find_language_problem).read(Answer(text, **answer), {})


@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```", "Sure, here it is:\n{} I hope it helps.", "<think>{{[no</think>{}"])
def test_an_object_is_found_in_all_usual_forms(form: str) -> None:
    (record,) = read(OBJECT, form.format(json.dumps(GOOD)))
    assert record == GOOD | {"query": "what?"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": ""}, "query: too short"), ({"query": "x" * 21}, "query: too long"), ({"query": 3}, "query: another type"),
        ({"score": 6}, "score: out of range"), ({"score": "2"}, "score: another type"),
        ({"score": True}, "score: another type"),
        ({"label": "maybe"}, "label: not one of the choices"), ({"texts": ["a", "b", "c"]}, "texts: too many items"),
        ({"other": 1}, "other: not expected"), ({"query": "I'm sorry, but"}, "refused"),
        ({"query": "half \ud83d"}, "query: not valid Unicode"),
    ],
)  # fmt: skip
def test_the_reason_of_an_invalid_answer_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidAnswerError) as error:
        read(OBJECT, json.dumps(GOOD | changes))
    assert str(error.value) == reason


def test_a_list_may_be_wrapped_or_written_as_in_python() -> None:
    for text in ('["a", "b", "a"]', '{"tasks": ["a", "b"]}', "The tasks: ['a', 'b']", '{"items": ["a", "b"]}'):
        assert read({"type": "list"}, text) == [{"item": "a"}, {"item": "b"}]
    for text in ("none", '["a"', '["a", 3]', "[]", "['a', __import__('os')]", "[{['a']}]"):
        with pytest.raises(InvalidAnswerError):
            read({"type": "list"}, text)


def test_refused_truncated_and_matching_answers_are_invalid() -> None:
    assert read({"type": "text"}, " fine ") == [{"text": "fine"}]
    for config, answer, reason in (
        ({}, {"text": "x", "refusal": "no"}, "refused"), ({}, {"text": "x", "finish_reason": "content_filter"}, "refused"),
        ({}, {"text": "As an AI, I do not"}, "refused"),
        ({}, {"text": "x", "finish_reason": "length"}, "truncated at max_tokens"),
        ({"reject": ["the passage"]}, {"text": "What does the passage say?"}, "matches a pattern of reject"),
    ):  # fmt: skip
        with pytest.raises(InvalidAnswerError, match=reason):
            read({"type": "text"} | config, **answer)


def test_schemas_are_strict_and_their_limits_can_be_left_out() -> None:
    schema = AnswerReader(AnswerConfig.model_validate(OBJECT), find_language_problem).schema
    assert schema is not None and schema["additionalProperties"] is False and schema["required"] == list(GOOD)
    assert schema["properties"]["query"]["maxLength"] == 20 and schema["properties"]["label"]["enum"] == ["yes", "no", "3"]
    assert "max" not in json.dumps(drop_limits(schema))


def test_keys_are_removed_and_placeholders_for_a_key_are_not() -> None:
    keys = ("none", "sk-0123456789")
    redacted = [ServerOptions(["http://a"], "m", api_key=key).redact(f"none has {keys[1]}") for key in keys]
    assert redacted == [f"none has {keys[1]}", "none has ***"]


@pytest.mark.parametrize("value", [float("nan"), "nan", 10**400])
def test_a_filter_drops_what_is_not_a_number(value: Any) -> None:
    step = FilterStep(FilterStepConfig(name="f", value="{ask.n}", minimum=1))
    assert list(step.run([Draft(("t", 0), {"ask": {"n": value}})])) == []
    assert step.counts.dropped == {"not a number": 1}


def test_chats_are_not_synthesized_and_shares_are_not_exceeded() -> None:
    task = {"name": "t", "steps": [{"name": "a", "kind": "ask", "requests": 1, "prompt": "p"}]}
    quotas = [{"by": "length", "max_share": 0.25}]
    rules = RowRules(TaskConfig.model_validate(task | {"row": {"text": "{a.text}"}, "quotas": quotas}), None, 10)  # type: ignore[arg-type]
    rows = [rules._compute_max_rows(quota) for quota in rules._task.quotas]
    assert rows == [2]
    with pytest.raises(UserError, match=r"task t: row has messages .expected at least the fields of one format: "):
        find_format(TaskConfig.model_validate(task | {"row": {"messages": "{a.text}"}}))


def make_request(prompt: str) -> Request:
    return Request("model", prompt, SamplingConfig(), seed=0)


def test_a_store_survives_half_a_line_and_refuses_a_second_writer(tmp_path: Path) -> None:
    path, requests = tmp_path / "answers.jsonl", [make_request(f"prompt {i}") for i in range(3)]
    store = AnswerStore(path)
    for request in requests:
        store.add(request, Answer(f"answer to {request.prompt}"))
    store.add(requests[0], Answer("a second answer"))
    with pytest.raises(UserError, match="another process is writing it"):
        AnswerStore(path)
    store.close()
    store.add(make_request("late"), Answer("late"))
    assert store.get(requests[0].key) is None
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 60, whole.index(b"\n") + 1, 5, 0):
        path.write_bytes(whole[:size])
        store = AnswerStore(path)
        for request in requests:
            if store.get(request.key) is None:
                store.add(request, Answer(f"answer to {request.prompt}"))
        store.close()
        assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match=r"answers.jsonl:1: damaged line .*Remove the line"):
        AnswerStore(path)


def test_a_request_is_identified_by_its_content() -> None:
    assert make_request("a").key == make_request("a").key != make_request("b").key
    assert (
        len(
            {
                make_request("a").key,
                Request("model", "a", SamplingConfig(), 1).key,
                Request("other", "a", SamplingConfig(), 0).key,
            }
        )
        == 3
    )


def test_results_come_in_the_order_of_the_jobs_and_stop_at_the_budget() -> None:
    def make_job(i: int) -> Job[int]:
        def run() -> tuple[int, int]:
            time.sleep(0.002 * (5 - i % 5))
            return i, 10

        return Job(run, 15)

    with Workers(4, TokenBudget(None)) as workers:
        assert list(workers.run_in_order(map(make_job, range(20)), lambda taken: 4)) == list(range(20))
    # 13 jobs cost 130; a 14th may need 15.
    for threads in (1, 3, 8):
        with Workers(threads, TokenBudget(144)) as workers:
            assert list(workers.run_in_order(map(make_job, range(20)), lambda taken: 8)) == list(range(13))
            assert workers.budget.is_spent


def test_dropped_jobs_release_their_reservation() -> None:
    budget = TokenBudget(100)
    with Workers(1, budget) as workers:
        results = workers.run_in_order((Job(lambda: (time.sleep(0.01), 1), 20) for _ in range(9)), lambda taken: 5)
        next(results)
        results.close()  # type: ignore[attr-defined]
        assert budget.reserve(95)


def test_near_duplicates_are_found_in_several_scripts() -> None:
    seen = SeenTexts("near", 0.8)
    texts = ["Find the article that explains the cause of a symptom", "请找到解释症状原因的文章和相关资料", "short"]
    assert all(map(seen.add, texts))
    copies = ["Find the article that explains the cause of a symptom!", "请找到解释症状原因的文章和相关资料。", "SHORT "]
    assert not any(map(seen.add, copies)) and seen.add("Find the river that explains a harbor in winter")
    exact = SeenTexts("exact")
    assert exact.add("Find it") and exact.add("Find its") and not exact.add("find  IT")
    assert (
        exact.add("new york", "city guide") and exact.add("new", "york city guide") and not exact.add("NEW", "york city guide")
    )


def test_languages_are_named_or_coded() -> None:
    codes = [find_language_code(name) for name in ("English", "german", "fr", "Klingon", "")]
    assert codes == ["en", "de", "fr", None, None]
    german = "Dieser Satz ist in deutscher Sprache geschrieben."
    assert find_language_problem(german, "English") == "in de" and find_language_problem(german, "German") is None
    assert find_language_problem(german, "Klingon") is None and find_language_problem("ok", "English") is None
