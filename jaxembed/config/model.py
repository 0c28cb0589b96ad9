"""The `model` section: the base, and what is put on it."""

from __future__ import annotations

import typing
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.sections import Section


def is_echo_template(template: str) -> bool:
    """Whether a template presents a text twice and ends with it."""
    return template.count("{text}") == 2 and template.endswith("{text}")


def is_example_template(template: str) -> bool:
    """Whether a template presents an in-context example; it may do without the instruction. Empty: made of others."""
    return not template or ("{query}" in template and "{response}" in template)


PoolingKind = Literal[
    "mean", "last", "first", "max", "weighted_mean", "latent_attention", "latent_attention_paper", "self_attention"
]


Attention = Literal["causal", "bidirectional", "prefix", "prefix_lm"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PoolingConfig(Section):
    kind: PoolingKind | None = Field(None, description="as the base says, else mean")
    include_instruction: bool | None = Field(None, description="pool instruction tokens too; as the base says, else no")
    latents: Annotated[int, Field(ge=1, le=2**16)] | None = Field(None, description="of latent attention; 512")
    heads: Annotated[int, Field(ge=1, le=2**12)] | None = Field(None, description="of latent and self-attention; 8")


class ProjectionConfig(Section):
    width: Annotated[int, Field(ge=0, le=2**16)] | None = Field(
        None, description="of a linear layer between pooling and normalisation, 0 for none; as the base says, else none"
    )
    bias: bool | None = Field(None, description="of that layer; as the base says, else no")


AdapterName = Annotated[str, Field(pattern=r"^[\w-]+$", max_length=100)]


class LoraConfig(Section):
    rank: Annotated[int, Field(ge=1, le=2**14)] = Field(16, description="width of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters' product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input, in training")
    targets: tuple[LoraTarget, ...] = Field(typing.get_args(LoraTarget), min_length=1, description="projections with adapters")
    base_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="of the frozen base; int8: its kernels, a scale an output channel, and the embedding in bfloat16"
    )
    names: tuple[AdapterName, ...] = Field(
        (), description="of several adapters, each trained by the sources that name it; empty: one, trained by all"
    )

    @field_validator("names")
    @classmethod
    def _one_adapter_a_name(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("the names of adapters must differ")
        return names


class ModelConfig(Section):
    base: str = Field(
        description="folder, run directory (its best checkpoint), hub id, or preset:NAME (random weights, tokenizer made from "
        "the data)"
    )
    attention: Attention | None = Field(
        None,
        description="as the base says, else bidirectional; prefix: causal in the instruction, bidirectional in the text; "
        "prefix_lm: the other way round",
    )
    pooling: PoolingConfig = PoolingConfig()
    projection: ProjectionConfig = ProjectionConfig()
    echo: str | None = Field(
        None, description="template that names {text} twice and ends with it, the second is pooled; as the base says, else none"
    )
    normalize: bool | None = Field(None, description="unit-length vectors; as the base says, else yes")
    append_eos: bool | None = Field(None, description="end every text with EOS; as the base says, else yes")
    instruction_template: str | None = Field(None, description="with {instruction}; as the base says, else E5's form")
    query_suffix: str | None = Field(
        None, description="follows every text that has a prompt, kept where the text is cut; as the base says, else none"
    )
    example_template: str | None = Field(
        None,
        description="of an in-context example, with {instruction}, {query} and {response}; as the base says, else made of "
        "instruction_template and query_suffix",
    )
    lora: LoraConfig | None = Field(None, description="train low-rank adapters and freeze the base; absent: train everything")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the computation, not parameters")
    remat: bool = Field(False, description="recompute layer activations in the backward pass to save memory")
    unroll: bool = Field(True, description="unroll the layer loop: faster steps, longer compilation")
    attention_kernel: Literal["auto", "einsum", "rows", "splash", "cudnn"] = Field(
        "auto", description="auto: rows on CPU, splash on TPU, else einsum; cudnn: on NVIDIA's GPUs, in bfloat16"
    )

    @model_validator(mode="after")
    def _template_names_instruction(self) -> ModelConfig:
        if self.instruction_template is not None and "{instruction}" not in self.instruction_template:
            raise ValueError("instruction_template must contain {instruction}")
        if self.echo and not is_echo_template(self.echo):
            raise ValueError("echo must name {text} twice and end with it")
        if not is_example_template(self.example_template or ""):
            raise ValueError("example_template must contain {query} and {response}")
        return self
