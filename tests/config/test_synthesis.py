"""The config of a synthesis: short forms, placeholders, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxembed.config.sections import make_key_table
from jaxembed.config.shipped import SYNTHESIS_FOLDER, list_shipped_configs
from jaxembed.config.synthesis import SynthesisConfig, load_synthesis_config
from jaxembed.config.synthesis_steps import ValuesConfig
from jaxembed.config.templates import fill_placeholders, get_only_placeholder, list_placeholders
from jaxembed.errors import UserError


@pytest.mark.parametrize("name", list_shipped_configs([SYNTHESIS_FOLDER]))
def test_shipped_recipes_are_valid_and_start_with_their_command(name: str) -> None:
    assert load_synthesis_config(name).tasks
    path = list_shipped_configs([SYNTHESIS_FOLDER])[name]
    assert "synthesize" in path.read_text().splitlines()[0]


def test_placeholders_are_names_in_braces_and_json_is_text() -> None:
    template = 'A {language} list of {tasks.item}: {"key": "{word}"}, {{word}}, {}, {1}, [{ "a": 1 }] {word}'
    assert list_placeholders(template) == ["language", "tasks.item", "word"]
    assert fill_placeholders(template, str.upper) == (
        'A LANGUAGE list of TASKS.ITEM: {"key": "WORD"}, {word}, {}, {1}, [{ "a": 1 }] WORD'
    )
    assert get_only_placeholder("{a.b}") == "a.b" and get_only_placeholder("{a} b") is get_only_placeholder("{{a}}") is None


def test_values_have_short_forms() -> None:
    assert ValuesConfig.model_validate([50, "no", 1.5]).choices == ("50", "no", "1.5")
    weighted = ValuesConfig.model_validate({"English": 3, "German": 1})
    assert weighted.choices == ("English", "German") and weighted.weights == (3, 1)
    assert ValuesConfig.model_validate({"file": "personas.txt"}).file == "personas.txt"


STEPS = "tasks.0.steps"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{STEPS}.0.kind=tell", "steps.0.kind is 'tell' .expected ask or retrieve or rank or round_trip or filter"),
        (f"{STEPS}.0.requests=null", "the first step must be of kind ask, with requests or per"),
        (f"{STEPS}.1.requests=3", "requests and per belong to the first step"),
        (f"{STEPS}.1.name=tasks", "two steps have the same name"),
        (
            f"{STEPS}.1.prompt='{{words}} {{tasks.text}}'",
            r"placeholder \{tasks.text\} has no values .*tasks.domain, tasks.item",
        ),
        (f"{STEPS}.1.prompt='{{tone}}'", r"placeholder \{tone\} has no values .* Add values.tone to the step"),
        (f"{STEPS}.1.values.words={{a: -1}}", "weights that are not negative"),
        (f"{STEPS}.1.distinct=[x]", "distinct names 'x', which has no values"),
        (f"{STEPS}.1.answer.fields.query={{type: choice}}", "choices belong to type choice"),
        (f"{STEPS}.1.answer.reject=['(']", "not a regular expression"),
        (f"{STEPS}.1.answer.fields.query.langage=x", "Did you mean tasks.0.steps.1.answer.fields.query.language"),
        (f"{STEPS}.1.answer.fields._query={{}}", "fields._query: this name is reserved. Choose another one"),
        (f"{STEPS}.1.answer.fields.model_config={{}}", "fields.model_config: this name is reserved"),
        (f"{STEPS}.1.answer.fields.language={{langage: x}}", "Did you mean tasks.0.steps.1.answer.fields.language.language"),
        (
            f"{STEPS}.1.values.words={{choices: [a, b], weights: [1]}}",
            "1 weights for 2 choices .expected one weight",
        ),
        ("tasks.0.row.title='x'", "unknown key tasks.0.row.title"),
        ("tasks.0.row.query='{example.queri}'", r"tasks.0.row.query: placeholder \{example.queri\} has no values"),
        ("tasks.0.quotas=[{by: '{example.words}', max_share: 0.5}]", "max_share needs the number of rows. Set max_rows"),
        ("tasks.0.quotas=[{by: length}]", "a quota needs max_rows or max_share"),
    ],
)
def test_bad_keys_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_synthesis_config("example", [override])


def test_inputs_must_be_named(tmp_path: Path) -> None:
    step: dict[str, Any] = {"name": "ask", "kind": "ask", "per": "documents", "prompt": "{documents.text}"}
    task = {"name": "t", "steps": [step], "row": {"text": "{ask.text}"}}
    path = tmp_path / "r.yaml"
    path.write_text(str({"name": "r", "inputs": {"documents": "x"}, "tasks": [task]}))
    assert load_synthesis_config(path, max_rows=3).max_rows == 3
    with pytest.raises(UserError, match=r"tasks.0.steps.0: no input 'documents'. Add inputs.documents: PATH"):
        load_synthesis_config(path, ["inputs={}"])
    steps = [
        step,
        {"name": "rank", "kind": "rank", "candidates": "found", "query": "x", "relevance": {"prompt": "x", "grades": [0, 1]}},
    ]
    path.write_text(str({"name": "r", "inputs": {"documents": "x"}, "tasks": [task | {"steps": steps}]}))
    with pytest.raises(UserError, match=r"steps.1.candidates is 'found' .expected the name of an earlier retrieve step"):
        load_synthesis_config(path)


def test_the_table_of_keys_lists_kinds_and_nested_fields() -> None:
    rows = make_key_table(SynthesisConfig)
    assert "| `tasks[].steps[].kind` | required | One of ask, retrieve, rank, round_trip, filter. |" in rows
    assert "`tasks[].steps[].answer.fields.KEY.max_chars`" in rows
    assert "| rank: Rank by grades that the model gives to the candidates. |" in rows
    assert "| `tasks[].steps[].sampling.max_tokens` | `16` | rank: Maximum tokens" in rows  # SamplingConfig has 1024
