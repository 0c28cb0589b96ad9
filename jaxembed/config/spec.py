"""The embedding spec: all choices, besides the weights, that determine the vector of a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from jaxembed.config.fields import MAX_INTEGER
from jaxembed.config.model import AttentionKind, ModelConfig, PoolingKind, is_echo_template, is_example_template
from jaxembed.config.sections import Section

EXAMPLE_SEPARATOR = "\n\n"  # follows every in-context example (bge-en-icl, Li et al. 2024)
EXAMPLE_PLACEHOLDER = re.compile(r"\{(instruction|query|response)\}")

MAX_HIDDEN_PROJECTIONS = 4  # linear layers before the projection

Activation = Literal["identity", "tanh"]
Length = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
LengthOrZero = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class FewShotExample(NamedTuple):
    """An in-context example: a query with its response, under an instruction."""

    instruction: str
    query: str
    response: str


class HiddenProjection(Section):
    """A linear layer between the pooling and the projection."""

    width: Annotated[int, Field(ge=1, le=2**16)] = Field(description="Output width.")
    bias: bool = Field(False, description="Bias of the layer.")
    activation: Activation = Field("identity", description="Activation after the layer.")


class EmbeddingSpec(Section):
    """How texts become vectors: mask, pooling, special tokens, prompts. Stored with the model, and read by every command."""

    model_config = ConfigDict(strict=True)

    attention: AttentionKind = Field("bidirectional", description="Attention mask.")
    pooling: PoolingKind = Field("mean", description="Pooling over the tokens of a text.")
    latents: Annotated[int, Field(ge=1, le=2**16)] = Field(512, description="Number of latents of latent attention.")
    pooling_heads: Annotated[int, Field(ge=1, le=2**12)] = Field(8, description="Heads of latent and self-attention.")
    include_instruction: bool = Field(True, description="Pool the instruction tokens too, as vLLM, TEI and llama.cpp do.")
    hidden_projections: tuple[HiddenProjection, ...] = Field(
        (), strict=False, max_length=MAX_HIDDEN_PROJECTIONS, description="Linear layers before the projection (EmbeddingGemma)."
    )
    projection: Annotated[int, Field(ge=0, le=2**16)] = Field(
        0, description="Width of the linear layer between pooling and normalization. 0: no layer."
    )
    projection_bias: bool = Field(False, description="Bias of the projection layer.")
    projection_activation: Activation = Field("identity", description="Activation after the projection layer.")
    normalize: bool = Field(True, description="Export a module that scales vectors to unit length.")
    append_eos: bool = Field(True, description="End every text with the EOS token.")
    eos_as_text: bool = Field(False, description="Append EOS before truncation, so that a truncated text has none (NV-Embed).")
    pool_last_instruction_token: bool = Field(
        False, description="Pool the last token before the text too, although the instruction is left out (NV-Embed)."
    )
    pool_text_tokens: bool = Field(
        False, description="Pool the last N tokens, where N counts the tokens of text and suffix tokenized alone (LLM2Vec)."
    )
    echo: str = Field(
        "",
        description="Template that names {text} twice and ends with it (Springer et al. 2024). Both copies are truncated at "
        "the same token, and the second one is pooled.",
    )
    plain_echo: str = Field("", description="Echo template for texts without a prompt.")
    text_length: LengthOrZero = Field(0, description="Maximum tokens of the text itself. 0: max_length minus the prompt.")
    max_length: Length = Field(512, description="Maximum tokens of prompt and text together, special tokens included.")
    instruction_template: str = Field(
        "Instruct: {instruction}\nQuery:", description="Template of the prompt that precedes a text; contains {instruction}."
    )
    plain_prompt: str = Field("", description="Prompt of texts without an instruction.")
    query_suffix: str = Field("", description="Text after every text that has a prompt.")
    example_template: str = Field(
        "",
        description="Template of an in-context example before the instruction. Empty: built from instruction_template and "
        "query_suffix.",
    )
    fixed_prompts: bool = Field(
        False,
        description="Give every text the prompt that is stored for its side, `query` or `document`, instead of an instruction "
        "(E5, BGE).",
    )
    prompts: dict[str, str] = Field({}, description="Complete prompts by name, such as `query` and `document`.")
    instruction_table: str = Field(
        "", description="Table of the instructions that evaluation gives tasks (configs/instructions). Empty: no table."
    )
    matryoshka_dims: tuple[Length, ...] = Field(
        (), strict=False, description="Widths to which vectors can be truncated, because the model was trained with them."
    )
    exit_layers: tuple[Length, ...] = Field(
        (),
        strict=False,
        description="Numbers of layers to which the model can be truncated, because it was trained with these exits.",
    )

    @model_validator(mode="after")
    def _check_templates(self) -> EmbeddingSpec:
        if "{instruction}" not in self.instruction_template:
            raise ValueError("instruction_template must contain {instruction}")
        for key in ("echo", "plain_echo"):
            if (template := getattr(self, key)) and not is_echo_template(template):
                raise ValueError(f"{key} must contain {{text}} twice and end with it")
        if not is_example_template(self.example_template):
            raise ValueError("example_template must contain {query} and {response}")
        return self

    def build_prompt(self, instruction: str | None, examples: Sequence[FewShotExample] = (), side: str | None = None) -> str:
        """Return the prompt that precedes a text.

        Args:
            instruction: The instruction. Without one, the prompt is `plain_prompt`.
            examples: In-context examples that precede the instruction.
            side: Side of the text, query or document. With `fixed_prompts`, only the side matters.
        """
        if self.fixed_prompts and side is not None:
            return self.prompts.get(side, self.plain_prompt)
        if not instruction:
            return self.plain_prompt
        examples_prompt = "".join(map(self.format_example, examples))
        return examples_prompt + self.instruction_template.replace("{instruction}", instruction)

    def extract_instruction(self, prompt: str) -> str:
        """Return the instruction in a prompt that `build_prompt` returned; empty for a prompt of another form."""
        before, _, after = self.instruction_template.partition("{instruction}")
        has_form = len(prompt) > len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after)
        return prompt[len(before) : len(prompt) - len(after)] if has_form else ""

    def get_suffix(self, prompt: str) -> str:
        """Return the suffix of a text with this prompt; empty without a prompt."""
        return self.query_suffix if prompt else ""

    def format_example(self, example: FewShotExample) -> str:
        """Return an in-context example as it appears in a prompt."""
        response = self.query_suffix or "\nResponse:"
        template = self.example_template or f"{self.instruction_template}{{query}}{response}{{response}}"
        return EXAMPLE_PLACEHOLDER.sub(lambda match: str(getattr(example, match[1])), template) + EXAMPLE_SEPARATOR

    def apply_model_config(self, model: ModelConfig, max_length: int) -> EmbeddingSpec:
        """Return this spec with the choices of a `model` section. Keys that the section does not set keep their values."""
        pools_instruction = model.pooling.include_instruction
        if pools_instruction is None and model.echo:
            pools_instruction = False  # an echo pools only its second copy
        choices: dict[str, Any] = {
            # Training keeps EOS on truncated texts.
            **({"eos_as_text": False, "append_eos": True} if self.eos_as_text else {}),
            "attention": model.attention,
            "pooling": model.pooling.kind,
            "latents": model.pooling.latents,
            "pooling_heads": model.pooling.heads,
            "include_instruction": pools_instruction,
            "projection": model.projection.width,
            "hidden_projections": None if model.projection.width in (None, self.projection) else (),
            "projection_bias": model.projection.bias,
            "normalize": model.normalize,
            "echo": model.echo,
            **({} if model.append_eos is None else {"append_eos": model.append_eos}),
            "instruction_template": model.instruction_template,
            "fixed_prompts": None if model.instruction_template is None else False,
            "query_suffix": model.query_suffix,
            "example_template": model.example_template,
            "max_length": max_length,
        }
        return self.replace(**{key: value for key, value in choices.items() if value is not None})

    def describe_vectors(self) -> dict[str, Any]:
        """Return the fields that determine the vector of a text, as plain values. They identify a model in caches and runs."""
        # Left out at its default, so that the hashes of earlier versions stay valid.
        absent = {key for key in ("fixed_prompts", "hidden_projections") if not getattr(self, key)}
        return self.model_dump(mode="json", exclude={"matryoshka_dims", "exit_layers", "instruction_table", *absent})

    def add_source_prompts(self, instructions: Mapping[str, tuple[str, str]]) -> EmbeddingSpec:
        """Return this spec with the prompts of named sources stored.

        Args:
            instructions: (query, document) instructions by source name. The first source also gives the prompts `query` and
                `document`; each source's name stores its query prompt.
        """
        if not instructions:
            return self
        query, document = next(iter(instructions.values()))
        prompts = {"query": self.build_prompt(query), "document": self.build_prompt(document)}
        # A source of an old run may be named `query` or `document`. It does not replace the prompts of the two sides.
        prompts |= {name: self.build_prompt(query) for name, (query, _) in instructions.items() if name not in prompts}
        return self.replace(prompts=prompts)
