"""What a model must remember about its texts, beside its weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxembed.config import ModelConfig

BETWEEN = "\n\n"  # stands after every in-context example, as bge-en-icl has it (Li et al. 2024)
OF_SHOT = re.compile(r"\{(instruction|query|response)\}")


class FewShotExample(NamedTuple):
    """An in-context example: a query with its response, under an instruction."""

    instruction: str
    query: str
    response: str


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
    """How texts become vectors, beside the weights: stored once with the model, read by every command.

    `latents` and `pooling_heads` size the poolings that have them. `projection` is the width of a linear layer between
    pooling and normalisation (0: none); the fields after it say whether it has a bias and what follows it.
    `instruction_template` turns an instruction into the prompt put before a text, `plain_prompt` stands before texts
    without one, and `query_suffix` follows the text of every input that has a prompt; `example_template` is how an
    in-context example is put before them (made of template and suffix where it is empty). `prompts` are whole prompts by
    name (`query` and `document` among them) for users who name no instruction. `echo` is a template that names {text} twice
    and ends with it (Springer et al. 2024): both copies are cut at the same token, the second is pooled; `plain_echo` stands
    in its place for texts without a prompt. `text_length` is the most tokens of a text itself (0: what `max_length` leaves).
    Habits of releases: with `eos_as_text` EOS is part of the text when it is cut, so a cut text has none; with
    `pool_last_instruction_token` the last token before the text is pooled too (both NV-Embed); with `pool_text_tokens` as
    many of the last tokens are pooled as the text and its suffix have by themselves (LLM2Vec).
    """

    attention: str = "bidirectional"
    pooling: str = "mean"
    latents: int = 512
    pooling_heads: int = 8
    include_instruction: bool = False
    projection: int = 0
    projection_bias: bool = False
    projection_activation: str = "identity"
    normalize: bool = True
    append_eos: bool = True
    eos_as_text: bool = False
    pool_last_instruction_token: bool = False
    pool_text_tokens: bool = False
    echo: str = ""
    plain_echo: str = ""
    text_length: int = 0
    max_length: int = 512
    instruction_template: str = "Instruct: {instruction}\nQuery:"
    plain_prompt: str = ""
    query_suffix: str = ""
    example_template: str = ""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def prompt(self, instruction: str | None, shots: Sequence[FewShotExample] = ()) -> str:
        """The text put before a text under an instruction, in-context examples first; or without an instruction."""
        if not instruction:
            return self.plain_prompt
        return "".join(map(self.shown, shots)) + self.instruction_template.replace("{instruction}", instruction)

    def shown(self, shot: FewShotExample) -> str:
        """An in-context example as it stands in a prompt."""
        response = self.query_suffix or "\nResponse:"
        template = self.example_template or f"{self.instruction_template}{{query}}{response}{{response}}"
        return OF_SHOT.sub(lambda found: str(getattr(shot, found[1])), template) + BETWEEN

    def with_choices(self, model: ModelConfig, max_length: int) -> EmbeddingSpec:
        """This spec with the choices that a config makes; what it leaves open stays."""
        chosen: dict[str, Any] = {
            **({"eos_as_text": False, "append_eos": True} if self.eos_as_text else {}),  # in training a cut text keeps EOS
            "attention": model.attention,
            "pooling": model.pooling.kind,
            "latents": model.pooling.latents,
            "pooling_heads": model.pooling.heads,
            "include_instruction": model.pooling.include_instruction,
            "projection": model.projection.width,
            "projection_bias": model.projection.bias,
            "normalize": model.normalize,
            "echo": model.echo,
            **({} if model.append_eos is None else {"append_eos": model.append_eos}),
            "instruction_template": model.instruction_template,
            "query_suffix": model.query_suffix,
            "example_template": model.example_template,
            "max_length": max_length,
        }
        return dataclasses.replace(self, **{k: v for k, v in chosen.items() if v is not None})

    def with_prompts(self, instructions: Mapping[str, tuple[str, str]]) -> EmbeddingSpec:
        """This spec with whole prompts for the (query, document) instructions of named sources.

        `query` and `document` are those of the first source; the queries of every source have their own too, by name.
        """
        if not instructions:
            return self
        query, document = next(iter(instructions.values()))
        prompts = {"query": self.prompt(query), "document": self.prompt(document)}
        prompts |= {name: self.prompt(of_query) for name, (of_query, _) in instructions.items()}
        return dataclasses.replace(self, prompts=prompts)
