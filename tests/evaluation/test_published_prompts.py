"""The prompts of published encoders, compared with those that mteb evaluates them with."""

import mteb
import pytest

from jaxembed.config.instructions import load_instruction_table
from jaxembed.formats.published import find_published_layout


@pytest.mark.parametrize(
    "name",
    [
        "intfloat/e5-small-v2",
        "intfloat/multilingual-e5-base",
        "BAAI/bge-base-en-v1.5",
        "BAAI/bge-base-zh-v1.5",
        "WhereIsAI/UAE-Large-V1",
        "mixedbread-ai/mxbai-embed-large-v1",
        "nomic-ai/modernbert-embed-base",
    ],
)
def test_prompts_are_those_of_mteb(name: str) -> None:
    layout = find_published_layout(name, None, {})
    assert layout is not None
    choices = layout.read_spec_choices(None, "")
    expected = mteb.get_model_meta(name).loader_kwargs["model_prompts"]
    assert choices["prompts"]["query"] == expected["query"].removesuffix("{text}")
    assert choices["prompts"]["document"] == expected.get("document", "")


@pytest.mark.parametrize("name", ["intfloat/multilingual-e5-large-instruct", "tencent/KaLM-Embedding-Gemma3-12B-2511"])
def test_the_template_is_that_of_mteb(name: str) -> None:
    layout = find_published_layout(name, None, {})
    assert layout is not None
    expected = mteb.get_model_meta(name).loader_kwargs["instruction_template"]
    assert layout.read_spec_choices(None, "")["instruction_template"] == expected


def test_the_table_of_kalm_v2_is_that_of_its_entry_in_mteb() -> None:
    name = "HIT-TMG/KaLM-embedding-multilingual-mini-instruct-v2"
    options = mteb.get_model_meta(name).loader_kwargs
    table = load_instruction_table("kalm_v2")
    assert table.template == options["instruction_template"]
    differences = []
    for key, instruction in options["prompts_dict"].items():
        task = key.removesuffix("-query").removesuffix("-document")
        kind = mteb.get_task(task).metadata.type
        found = table.find_instruction(task, kind), table.is_symmetric(task, kind)
        if found != (instruction, f"{task}-document" in options["prompts_dict"]):
            differences.append((key, found))
    assert len(options["prompts_dict"]) == 138 and differences == []


def test_sfr_and_linq_have_no_instructions_in_mteb() -> None:
    """Should mteb list instructions by task one day, they belong into a table."""
    for name in ("Salesforce/SFR-Embedding-Mistral", "Linq-AI-Research/Linq-Embed-Mistral"):
        assert "prompts_dict" not in mteb.get_model_meta(name).loader_kwargs
