"""Values of recipes name their source, and agree with what was transcribed from published code, reports and models.

test_recipes.py compares the values of the papers of NV-Embed and KaLM, and of the survey.
"""

from __future__ import annotations

import json
import re
import runpy
from typing import Any

import pytest
import transformers
import yaml

from helpers.recipes import NAMES, find_recipe, load_recipe
from jaxembed.config.shipped import find_shipped_folder
from jaxembed.data.tokenize import TOKEN_BOUNDARY
from jaxembed.formats.published import find_published_layout

ROOT = find_shipped_folder().parent
PAGES = runpy.run_path(str(ROOT / "docs" / "recipe_pages.py"))
TABLE = yaml.safe_load((ROOT / "tests" / "data_tables" / "published.yaml").read_text())
# Sources that test_recipes.py compares (a number begins a calculation from their tables), and those that nobody can compare.
OTHER_SOURCES = re.compile(r"NV-Embed,|KaLM,|first KaLM report|one epoch|survey,|\d|our choice")
PUBLISHED_MODELS = {
    "bge_en_icl": "bge-en-icl", "e5_mistral": "e5-mistral-7b-instruct", "echo_mistral": "echo-mistral-7b-instruct-lasttoken",
    "gritlm": "GritLM-7B", "gte_qwen1_5": "gte-Qwen1.5-7B-instruct", "gte_qwen2": "gte-Qwen2-7B-instruct",
    "kalm_v1": "KaLM-embedding-multilingual-mini-instruct-v1", "kalm_v2": "KaLM-embedding-multilingual-mini-instruct-v2",
    "kalm_v1_no_pretraining": "KaLM-embedding-multilingual-mini-instruct-v1", "linq_embed_mistral": "Linq-Embed-Mistral",
    "llm2vec": "LLM2Vec-Mistral-7B-Instruct-v2-mntp", "llm2vec_simcse": "LLM2Vec-Mistral-7B-Instruct-v2-mntp",
    "qwen3_embedding": "Qwen3-Embedding-0.6B", "sfr_embedding_mistral": "SFR-Embedding-Mistral",
}  # fmt: skip
# Keys of recipes -> fields of `EmbeddingSpec`.
LAYOUT_FIELDS = {
    "model.attention": "attention", "model.pooling.kind": "pooling", "model.append_eos": "append_eos",
    "model.pooling.include_instruction": "include_instruction", "model.instruction_template": "instruction_template",
    "model.query_suffix": "query_suffix", "model.example_template": "example_template", "model.echo": "echo",
    "data.max_length": "max_length",
}  # fmt: skip
TRANSFORMERS_FIELDS = {
    "optim.schedule": "lr_scheduler_type", "optim.weight_decay": "weight_decay", "optim.clip": "max_grad_norm",
    "stages.0.optim.learning_rate": "learning_rate", "stages.0.optim.warmup_steps": "warmup_steps",
}  # fmt: skip


def read_values(name: str) -> list[Any]:
    """Return the values of a recipe with their sources. Data sets are left out."""
    listed = PAGES["iter_values"](find_recipe(name).read_text())
    return [entry for entry in listed if isinstance(entry, PAGES["Value"])]


def join_boundaries(template: Any) -> Any:
    """Return a template with spaces for the boundaries of tokens. Other values stay."""
    return re.sub(" +(?=\n|$)", "", template.replace(TOKEN_BOUNDARY, " ")) if TOKEN_BOUNDARY in str(template) else template


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_a_confirmed_source_or_is_our_choice(name: str) -> None:
    transcribed = {key for entry in TABLE.get(name, ()) for key in entry["values"]}
    values = read_values(name)
    assert len(values) > 20
    for value in values:
        if value.source.startswith("published model") and value.key not in transcribed:
            assert name in PUBLISHED_MODELS and value.key in LAYOUT_FIELDS, value
        elif "transformers' default" in value.source:
            assert value.key in TRANSFORMERS_FIELDS, value
        else:
            assert OTHER_SOURCES.match(value.source) or value.key in transcribed, value


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name, entries in TABLE.items() for entry in entries])
def test_recipes_have_the_values_of_published_code_and_reports(name: str, entry: dict[str, Any]) -> None:
    values = {value.key: json.loads(value.text) for value in read_values(name)}
    assert {key: values.get(key) for key in entry["values"]} == entry["values"]
    names = [source.name.removeprefix("nemotron-") for source in load_recipe(name).stages[-1].data.sources]
    assert names == entry.get("sources", names)


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_recipes_have_the_layouts_of_published_models(name: str) -> None:
    layout = find_published_layout(PUBLISHED_MODELS[name], None, {})
    assert layout is not None
    choices = layout.read_spec_choices(None, "")
    compared = [value for value in read_values(name) if value.source.startswith("published model")]
    assert compared
    for value in compared:
        assert json.loads(value.text) == join_boundaries(choices[LAYOUT_FIELDS[value.key]]), value.key


def test_defaults_of_transformers_are_its_defaults() -> None:
    fields = transformers.TrainingArguments.__dataclass_fields__
    defaulted = [value for name in NAMES for value in read_values(name) if "transformers' default" in value.source]
    assert defaulted
    for value in defaulted:
        assert json.loads(value.text) == fields[TRANSFORMERS_FIELDS[value.key]].default, value
