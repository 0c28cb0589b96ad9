"""Steps that search documents and rank them by the model, as in Gecko, and the round trip from a document to its query."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers.llm_server import MODEL, Behavior, LlmServer, read_prompt
from jaxembed.config.synthesis_steps import SamplingConfig
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.search.bm25 import Bm25Index
from jaxembed.synthesis.endpoints import ServerOptions, TooLongError
from jaxembed.synthesis.ranking import fuse_scores, rank_scored, read_grade
from jaxembed.synthesis.requests import Answer, Request
from jaxembed.synthesis.retrieval import DocumentIndex
from jaxembed.synthesis.servers import LlmServers

from .conftest import Synthesize

TOPICS = ("kettle", "ferry", "museum", "bread", "violin", "harbor", "copper", "garden")
DOCUMENTS = [
    {"id": f"d{i}", "title": f"The {topic}", "text": f"A {topic} needs care. The {topic} of the town is number {i}."}
    for i, topic in enumerate(TOPICS)
]
ASK = {"name": "ask", "kind": "ask", "per": "documents", "prompt": "Ask about: {documents.text}\n\"query\":",
       "answer": {"type": "object", "fields": {"query": {}}}}  # fmt: skip
FIND = {"name": "find", "kind": "retrieve", "query": "{ask.query}", "k": 3}
RANK = {
    "name": "rank", "kind": "rank", "candidates": "find", "query": "{ask.query}",
    "relevance": {"prompt": "Passage: {candidate.text}\nQuery: {ask.query}\nWrite the grade.", "grades": [0, 1, 2, 3]},
    "likelihood": {"prompt": "Passage: {candidate.text}\nQuery: "},
}  # fmt: skip
PAIR = {"query": "{ask.query}", "pos": ["{rank.positive}"], "neg": ["{rank.negative}"]}


def answer_by(find_query: Callable[[str], str]) -> Callable[[Mapping[str, Any]], str]:
    """Return the answers of a server: a query about the topic of a passage, and a grade of how many query words it has."""

    def write(body: Mapping[str, Any]) -> str:
        prompt = read_prompt(body)
        if prompt.startswith("Ask about: A "):
            return json.dumps({"query": find_query(prompt.split()[3])})
        passage, query = prompt.removeprefix("Passage: ").split("\n")[:2]
        return str(min(sum(word in passage.lower() for word in query.removeprefix("Query: ").lower().split()), 3))

    return write


def is_about(text: str, topic: str) -> bool:
    return text.startswith(f"The {topic}")


@pytest.fixture
def write_recipe(recipe: Path, tmp_path: Path) -> Callable[..., None]:
    """Writes a recipe with steps over `DOCUMENTS`: write_recipe(*steps, row=...)."""
    write_jsonl(tmp_path / "docs.jsonl", DOCUMENTS)

    def write(*steps: Mapping[str, Any], row: Mapping[str, Any] = PAIR) -> None:
        task = {"name": "fret", "steps": [ASK, *steps], "row": row}
        inputs = {"documents": str(tmp_path / "docs.jsonl")}
        recipe.write_text(yaml.safe_dump({"name": "test", "inputs": inputs, "duplicates": "exact", "tasks": [task]}))

    return write


@pytest.mark.parametrize("gives_logprobs", [True, False])
def test_the_best_candidate_becomes_the_positive_and_another_the_negative(
    synthesize: Synthesize, server: LlmServer, write_recipe: Callable[..., None], tmp_path: Path,
    caplog: pytest.LogCaptureFixture, gives_logprobs: bool,
) -> None:  # fmt: skip
    next_topic = dict(zip(TOPICS, (*TOPICS[1:], TOPICS[0]), strict=True))
    server.behavior = Behavior(write=answer_by(lambda topic: f"{next_topic[topic]} care town"), gives_logprobs=gives_logprobs)
    write_recipe(FIND, RANK)
    caplog.set_level("INFO", "jaxembed")
    result = synthesize()
    rows = [json.loads(line) for line in (tmp_path / "out/fret.jsonl").read_text().splitlines()]
    assert result["rows"] == {"fret": 8}
    # The passage that a query was written from is not the one that it is about, which is found and relabeled.
    for row in rows:
        topic = row["query"].split()[0]
        assert is_about(row["pos"][0], topic) and not is_about(row["neg"][0], topic)
    scored = [body for body in server.bodies if body.get("echo")]
    assert len(scored) == 24 if gives_logprobs else "refuses logprobs of a prompt" in caplog.text
    origins = [json.loads(line) for line in (tmp_path / "out/provenance/fret.jsonl").read_text().splitlines()]
    assert sorted(origin["input_row"] for origin in origins) == list(range(1, 9))
    asked = len(server.bodies)
    assert synthesize()["rows"] == {"fret": 8}
    assert [body for body in server.bodies[asked:] if not body.get("echo")] == []


def test_a_query_must_find_its_own_document(
    synthesize: Synthesize, server: LlmServer, write_recipe: Callable[..., None], tmp_path: Path
) -> None:
    server.behavior = Behavior(write=answer_by(lambda topic: f"the {topic}" if topic > "f" else "unrelated words"))
    write_recipe({"name": "back", "kind": "round_trip", "query": "{ask.query}"},
                 row={"query": "{ask.query}", "pos": ["{documents.text}"]})  # fmt: skip
    synthesize()
    report = json.loads((tmp_path / "out/report.json").read_text())["tasks"]["fret"]
    queries = {json.loads(line)["query"] for line in (tmp_path / "out/fret.jsonl").read_text().splitlines()}
    assert queries == {f"the {topic}" for topic in TOPICS if topic > "f"}
    assert report["steps"][1]["dropped"] == {"its query does not find its document": 8 - len(queries)}


def test_a_filter_keeps_what_meets_its_condition(
    synthesize: Synthesize, server: LlmServer, write_recipe: Callable[..., None], tmp_path: Path
) -> None:
    server.behavior = Behavior(write=answer_by(lambda topic: str(len(topic))))
    row = {"query": "{documents.title}", "pos": ["{documents.text}"]}
    write_recipe({"name": "long", "kind": "filter", "value": "{ask.query}", "minimum": 6}, row=row)
    assert synthesize()["rows"] == {"fret": sum(len(topic) >= 6 for topic in TOPICS)}


def test_documents_without_text_or_the_field_of_a_template_are_refused(
    synthesize: Synthesize, server: LlmServer, write_recipe: Callable[..., None], tmp_path: Path
) -> None:
    write_recipe(FIND, RANK)
    write_jsonl(tmp_path / "docs.jsonl", [{"id": "1", "body": "x"}])
    with pytest.raises(UserError, match=r"inputs.documents: row 1: \"text\" is missing .* Rows that are searched need a text"):
        synthesize()
    write_recipe(row={"query": "{ask.query}", "pos": ["{documents.text}"]})
    write_jsonl(tmp_path / "docs.jsonl", [{"id": "1", "body": "x"}])
    with pytest.raises(UserError, match=r"inputs.documents: a row has no field 'text' \(found id, body\)"):
        synthesize(out="other")


def test_vectors_of_a_model_find_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    index = DocumentIndex("documents", DOCUMENTS, "some-model")
    vectors = dict(zip(index.texts, np.eye(8, dtype=np.float32), strict=True))
    monkeypatch.setattr(index, "_encode", lambda texts, name, **_: np.stack([vectors[text] for text in texts]))
    assert [found[0] for found in index.search(index.texts[2:5], 2)] == [2, 3, 4]


def test_bm25_gives_scores_and_an_unknown_query_finds_nothing() -> None:
    rows, scores = Bm25Index([row["text"] for row in DOCUMENTS]).search(["ferry", "unheard"], 2)
    assert rows[0, 0] == 1 and scores[0, 0] > scores[0, 1] == 0
    assert DocumentIndex("documents", DOCUMENTS, "bm25").search(["unheard"], 2) == [[]]


def test_ranks_are_fused_by_their_reciprocals() -> None:
    # Ranks 1, 2, 3 and 2, 3, 1: 1/61 + 1/62, 1/62 + 1/63, 1/63 + 1/61.
    assert fuse_scores([[3.0, 2.0, 1.0], [2.0, 1.0, 3.0]], 60) == [0, 2, 1]
    assert fuse_scores([[0.0, 0.0, 1.0]], 60) == [2, 0, 1]


def test_candidates_without_a_score_are_left_out() -> None:
    none = -math.inf
    assert rank_scored([[1.0, none, 3.0], [none, none, none]], 60) == [2, 0]
    assert rank_scored([[1.0, none, 3.0], [none, 5.0, 2.0]], 60) == [2, 1, 0]
    assert rank_scored([[none, none]], 60) == []


def test_a_text_that_is_too_long_to_score_does_not_switch_likelihood_off(server: LlmServer) -> None:
    server.behavior = Behavior(max_prompt_chars=10)
    servers = LlmServers(ServerOptions([server.url], MODEL))
    with pytest.raises(TooLongError):
        servers.ask(Request(MODEL, "Passage: " * 9, SamplingConfig(), seed=0, scored_text="text"))
    server.behavior = Behavior()
    assert servers.ask(Request(MODEL, "Passage: ", SamplingConfig(), seed=0, scored_text="text")).likelihood is not None


def test_the_grade_is_the_expectation_over_the_probabilities_of_the_server() -> None:
    grades = ("0", "1", "2")
    assert read_grade(Answer("2", logprobs={"2": np.log(0.5), "0": np.log(0.25)}), grades) == pytest.approx(4 / 3)
    assert read_grade(Answer(" 1."), grades) == 1 and read_grade(Answer("none"), grades) is None
    assert read_grade(Answer("10"), ("1", "10")) == 1
