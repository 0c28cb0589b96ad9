"""The prompts of published encoders, compared with those that mteb evaluates them with."""

import mteb
import pytest

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


def test_the_template_is_that_of_mteb() -> None:
    name = "intfloat/multilingual-e5-large-instruct"
    layout = find_published_layout(name, None, {})
    assert layout is not None
    expected = mteb.get_model_meta(name).loader_kwargs["instruction_template"]
    assert layout.read_spec_choices(None, "")["instruction_template"] == expected
