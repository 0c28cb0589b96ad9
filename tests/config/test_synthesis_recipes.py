"""The shipped synthesis recipes, compared value by value with the papers (tests/data_tables/synthesis.yaml)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxembed.config.shipped import SYNTHESIS_FOLDER, find_shipped_folder, list_shipped_configs
from jaxembed.config.synthesis import SynthesisConfig, TaskConfig, load_synthesis_config
from jaxembed.config.synthesis_steps import (
    AskStepConfig,
    FilterStepConfig,
    RankStepConfig,
    RetrieveStepConfig,
    RoundTripStepConfig,
)
from jaxembed.config.templates import list_placeholders

TABLES: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "data_tables" / "synthesis.yaml").read_text())
PUBLISHED = ("e5_mistral", "nv_embed", "kalm", "gecko", "uae", "linq", "domain")
PAPERS = ("e5_mistral", "nv_embed", "kalm")
NAMES = sorted(list_shipped_configs([SYNTHESIS_FOLDER]))
LANGUAGE_PLACEHOLDERS = {"language", "src_lang", "tgt_lang"}


@pytest.fixture(scope="module")
def recipes() -> dict[str, SynthesisConfig]:
    return {name: load_synthesis_config(name) for name in NAMES}


def find_task(recipe: SynthesisConfig, name: str) -> TaskConfig:
    return next(task for task in recipe.tasks if task.name == name)


def get_writer(task: TaskConfig) -> AskStepConfig:
    """Return the step that writes examples: the last one that asks for an object of strings."""
    return next(step for step in iter_ask_steps(task) if step.name == "example")


def iter_ask_steps(task: TaskConfig) -> Iterator[AskStepConfig]:
    return (step for step in task.steps if isinstance(step, AskStepConfig))


def read_values(step: AskStepConfig) -> dict[str, list[str]]:
    """Return the values of each placeholder but the languages."""
    return {name: list(values.choices) for name, values in step.values.items() if name not in LANGUAGE_PLACEHOLDERS}


def test_seven_recipes_ship() -> None:
    assert set(NAMES) >= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_begins_with_its_command_and_has_its_name(name: str, recipes: dict[str, SynthesisConfig]) -> None:
    first = (find_shipped_folder() / SYNTHESIS_FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert re.match(rf"# python -m jaxembed\.synthesize {name} OUT (inputs\.\w+=\S+ )?--server URL --model NAME$", first)
    assert recipes[name].name == name


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_used(name: str, recipes: dict[str, SynthesisConfig]) -> None:
    for task in recipes[name].tasks:
        for step in iter_ask_steps(task):
            used = {placeholder for template in step.list_templates().values() for placeholder in list_placeholders(template)}
            assert set(step.values) <= used, (task.name, step.name)


@pytest.mark.parametrize("name", ["e5_mistral", "nv_embed"])
def test_placeholders_and_fields_are_those_of_the_tables(name: str, recipes: dict[str, SynthesisConfig]) -> None:
    for group, placeholders in TABLES[name]["placeholders"].items():
        assert read_values(get_writer(find_task(recipes[name], group))) == placeholders, group
    for group, fields in TABLES[name]["fields"].items():
        assert list(get_writer(find_task(recipes[name], group)).answer.fields) == fields, group


@pytest.mark.parametrize("name", ["kalm", "linq"])
def test_recipes_without_published_prompts_have_e5_mistrals_values(name: str, recipes: dict[str, SynthesisConfig]) -> None:
    for task in recipes[name].tasks:
        step = get_writer(task)
        assert read_values(step) == TABLES["e5_mistral"]["placeholders"][task.name]
        assert list(step.answer.fields) == TABLES["e5_mistral"]["fields"][task.name]


def test_groups_have_their_shares(recipes: dict[str, SynthesisConfig]) -> None:
    groups = {task.name: task.weight for task in recipes["e5_mistral"].tasks}
    assert groups == TABLES["e5_mistral"]["groups"]
    assert [task.name for task in recipes["nv_embed"].tasks] == TABLES["nv_embed"]["groups"]
    assert {task.weight for task in recipes["nv_embed"].tasks} == {1}
    assert len(recipes["kalm"].tasks) == TABLES["kalm"]["kinds"]


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_write_the_published_number_of_rows(name: str, recipes: dict[str, SynthesisConfig]) -> None:
    """The requests yield at least as many rows as the paper has, if a list has as many elements as it asks for."""
    recipe, table = recipes[name], TABLES[name]
    assert recipe.max_rows == table["examples"]
    elements = table.get("list_elements", TABLES["e5_mistral"]["list_elements"])
    rows = 0
    for task in recipe.tasks:
        first, *later = iter_ask_steps(task)
        assert first.requests is not None
        rows += first.requests * (elements * later[0].repeat if later else 1)
    assert rows >= table["examples"]


def test_two_steps_write_the_published_number_of_instructions(recipes: dict[str, SynthesisConfig]) -> None:
    counts = {}
    for name, elements in (("e5_mistral", 20), ("kalm", 20), ("nv_embed", 40)):
        firsts = [task.first for task in recipes[name].tasks if task.first.answer.type == "list"]
        counts[name] = elements * sum(step.requests or 0 for step in firsts)
        assert all(f"about {elements} strings" in step.prompt for step in firsts)
    assert counts == {"e5_mistral": 150_000, "kalm": TABLES["kalm"]["instructions"], "nv_embed": TABLES["nv_embed"]["tasks"]}


def test_sampling_is_that_of_the_paper(recipes: dict[str, SynthesisConfig]) -> None:
    for task in recipes["e5_mistral"].tasks:
        for step in iter_ask_steps(task):
            assert step.sampling.model_dump(include={"temperature", "top_p"}) == TABLES["e5_mistral"]["sampling"]


def test_e5_mistral_draws_93_languages_by_the_published_shares(recipes: dict[str, SynthesisConfig]) -> None:
    table = TABLES["e5_mistral"]
    drawn = [step.values[name] for task in recipes["e5_mistral"].tasks for step in iter_ask_steps(task)
             for name in LANGUAGE_PLACEHOLDERS & set(step.values)]  # fmt: skip
    assert len(drawn) == 7  # six groups, and the second language of translations
    for values in drawn:
        shares = dict(zip(values.choices, values.weights, strict=True))
        assert sorted(shares) == TABLES["xlm_r_languages"] and len(shares) == table["languages"]
        others = {name: share for name, share in shares.items() if name not in table["language_shares"]}
        assert {name: share for name, share in shares.items() if name not in others} == table["language_shares"]
        assert len(set(others.values())) == 1
        assert sum(others.values()) == pytest.approx(table["other_languages_share"], abs=0.01)


def test_every_written_text_has_the_drawn_language(recipes: dict[str, SynthesisConfig]) -> None:
    for name in ("e5_mistral", "kalm"):
        for task in recipes[name].tasks:
            step = get_writer(task)
            languages = {field: rules.language for field, rules in step.answer.fields.items()}
            if task.name == "bitext":
                assert languages == {"S1": "{src_lang}", "S2": "{tgt_lang}", "S3": "{tgt_lang}"}
                assert set(step.distinct) == {"src_lang", "tgt_lang"}
            else:
                assert set(languages.values()) == {"{language}"}


def test_kalm_has_personas_in_the_instruction_step_only(recipes: dict[str, SynthesisConfig]) -> None:
    steps = [(step, i) for task in recipes["kalm"].tasks for i, step in enumerate(iter_ask_steps(task))]
    with_persona = [step for step, _ in steps if step.system]
    assert len(with_persona) == TABLES["kalm"]["kinds_with_instructions"]
    assert all(
        step.system == "{persona}" and step.answer.type == "list" and step.values["persona"].file for step in with_persona
    )
    assert not any("persona" in template for step, _ in steps for template in (step.prompt,))
    personas = (find_shipped_folder() / SYNTHESIS_FOLDER / "personas.txt").read_text().splitlines()
    assert len(set(personas)) == len(personas) == 60


def test_gecko_relabels_among_its_candidates(recipes: dict[str, SynthesisConfig]) -> None:
    write, retrieve, rank = recipes["gecko"].tasks[0].steps
    assert isinstance(write, AskStepConfig) and write.per == "documents"
    assert list(write.answer.fields) == TABLES["gecko"]["fields"]
    assert isinstance(retrieve, RetrieveStepConfig) and retrieve.k == TABLES["gecko"]["candidates"]
    assert isinstance(rank, RankStepConfig) and rank.likelihood and rank.relevance
    assert rank.hard_negative == TABLES["gecko"]["hard_negative"]
    row = recipes["gecko"].tasks[0].row
    assert row == {
        "prompt": "{query.task}", "query": "{query.query}", "pos": ("{rank.positive}",), "neg": ("{rank.negative}",),
    }  # fmt: skip


def test_uae_annotates_pairs_with_scores_and_labels(recipes: dict[str, SynthesisConfig]) -> None:
    rows = {task.name: set(task.row) for task in recipes["uae"].tasks}
    assert rows["similarity"] == {"sentence1", "sentence2", "score"}
    assert rows["entailment"] == {"premise", "hypothesis", "label"}
    assert {task.first.per for task in recipes["uae"].tasks} == {"pairs"}


def test_linq_filters_positives_and_negatives(recipes: dict[str, SynthesisConfig]) -> None:
    filters = {
        task.name: [step.value for step in task.steps if isinstance(step, FilterStepConfig)] for task in recipes["linq"].tasks
    }
    assert filters == {"short_long": ["{positive_judge.grade}", "{negative_judge.grade}"], "long_short": ["{judge.label}"]}


def test_a_question_of_the_domain_must_find_its_passage(recipes: dict[str, SynthesisConfig]) -> None:
    ask, round_trip = recipes["domain"].tasks[0].steps
    assert isinstance(ask, AskStepConfig) and ask.per == "documents"
    assert isinstance(round_trip, RoundTripStepConfig) and round_trip.k == 1
