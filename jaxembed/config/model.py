"""The `model` section: the base, the embedding model built on it, and how it is computed."""

from __future__ import annotations

import typing
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from jaxembed.config.sections import Section

AttentionKind = Literal["causal", "bidirectional", "prefix", "prefix_lm"]
PoolingKind = Literal[
    "mean", "last", "first", "max", "weighted_mean", "latent_attention", "latent_attention_paper", "self_attention"
]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FreezablePart = Literal["embedding"]
AdapterName = Annotated[str, Field(pattern=r"^[\w-]+$", max_length=100)]
MAX_LORA_RANK = 2**14


def is_echo_template(template: str) -> bool:
    """Return whether a template contains {text} twice and ends with it."""
    return template.count("{text}") == 2 and template.endswith("{text}")


def is_example_template(template: str) -> bool:
    """Return whether a template of an in-context example is valid: it contains {query} and {response}, or is empty.

    {instruction} is optional. An empty template means that it is built from other templates.
    """
    return not template or ("{query}" in template and "{response}" in template)


class PoolingConfig(Section):
    """How the hidden states of a text become one vector."""

    kind: PoolingKind | None = Field(None, description="Kind of pooling. Default: taken from the base model, otherwise mean.")
    include_instruction: bool | None = Field(
        None,
        description="Pool the tokens of the instruction too, as vLLM, TEI and llama.cpp do. Default: taken from the base "
        "model, otherwise true; with echo false.",
    )
    latents: Annotated[int, Field(ge=1, le=2**16)] | None = Field(
        None, description="Number of latents of latent attention. Default: taken from the base model, otherwise 512."
    )
    heads: Annotated[int, Field(ge=1, le=2**12)] | None = Field(
        None, description="Heads of latent attention and self-attention. Default: taken from the base model, otherwise 8."
    )


class ProjectionConfig(Section):
    """The linear layer between pooling and normalization."""

    width: Annotated[int, Field(ge=0, le=2**16)] | None = Field(
        None,
        description="Output width of a linear layer between pooling and normalization. 0: no such layer. Default: taken from "
        "the base model, otherwise 0.",
    )
    bias: bool | None = Field(
        None, description="Bias of the projection layer. Default: taken from the base model, otherwise false."
    )


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on a frozen base. `model/lora.py` computes them."""

    rank: Annotated[int, Field(ge=1, le=MAX_LORA_RANK)] = Field(16, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale of the adapters: their update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the adapters' input during training.")
    targets: tuple[LoraTarget, ...] = Field(
        typing.get_args(LoraTarget), min_length=1, description="Projections that have adapters, by their names in PEFT."
    )
    base_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="Dtype in which the frozen base is stored. int8: kernels in int8 with a scale per output channel, the "
        "embedding in bfloat16.",
    )
    names: tuple[AdapterName, ...] = Field(
        (),
        description="Names of several adapters. Each is trained by the sources that name it. Empty: one adapter, trained by "
        "all sources.",
    )

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the adapters' update."""
        return self.alpha / self.rank

    @field_validator("names")
    @classmethod
    def _check_unique(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("the names of adapters must differ")
        return names


class ModelConfig(Section):
    """The model that is trained."""

    base: str = Field(
        description="Model to start from: a folder, a run directory (its best checkpoint), a Hugging Face Hub id, or "
        "preset:NAME (random weights, with a tokenizer trained on the data)."
    )
    attention: AttentionKind | None = Field(
        None,
        description="Attention mask. prefix: causal in the instruction, bidirectional in the text. prefix_lm: bidirectional in "
        "the instruction, causal in the text. Default: taken from the base model, otherwise bidirectional.",
    )
    pooling: PoolingConfig = PoolingConfig()
    projection: ProjectionConfig = ProjectionConfig()
    echo: str | None = Field(
        None,
        description="Template that contains {text} twice and ends with it. The second copy is pooled. Default: taken from the "
        "base model, otherwise none.",
    )
    normalize: bool | None = Field(
        None,
        description="Export a module that scales vectors to unit length. Training and encode always scale them. Default: taken "
        "from the base model, otherwise true.",
    )
    append_eos: bool | None = Field(
        None, description="End every text with EOS. Default: taken from the base model, otherwise true."
    )
    instruction_template: str | None = Field(
        None,
        description="Template of the prompt before a text; contains {instruction}. Default: taken from the base model, "
        'otherwise "Instruct: ", the instruction, and "Query:" on a separate line.',
    )
    query_suffix: str | None = Field(
        None,
        description="Text after every text that has a prompt. Truncation keeps it. Default: taken from the base model, "
        "otherwise none.",
    )
    example_template: str | None = Field(
        None,
        description="Template of an in-context example; contains {query} and {response}, and may contain {instruction}. "
        "Default: taken from the base model, otherwise built from instruction_template and query_suffix.",
    )
    lora: LoraConfig | None = Field(
        None, description="Train low-rank adapters and freeze the base. Default: train all parameters."
    )
    frozen: tuple[FreezablePart, ...] = Field(
        (),
        description="Parameters that keep the values of the base, without gradient and optimizer state. embedding: the token "
        "embedding, and with it a language-model head that is tied to it.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype of the computation. Trained parameters are always float32."
    )
    remat: bool = Field(False, description="Recompute the activations of each layer in the backward pass, which saves memory.")
    remat_policy: Literal["nothing", "attention", "matmuls", "offload"] = Field(
        "nothing",
        description="Values that remat keeps of a layer, besides its input. attention: the output of the attention. "
        "matmuls: also the outputs of all projections. offload: the same as matmuls, but in the memory of the host.",
    )
    unroll: bool = Field(True, description="Unroll the loop over the layers: steps are faster, compilation takes longer.")
    attention_kernel: Literal["auto", "einsum", "rows", "splash", "cudnn"] = Field(
        "auto",
        description="Attention kernel. auto: rows on CPUs, splash on TPUs, cudnn on GPUs. cudnn needs an NVIDIA GPU "
        "and bfloat16. If the kernel does not support the model, einsum is used. A kernel of another platform is an error.",
    )

    @model_validator(mode="after")
    def _check_templates(self) -> ModelConfig:
        if self.instruction_template is not None and "{instruction}" not in self.instruction_template:
            raise ValueError("instruction_template must contain {instruction}")
        if self.echo and not is_echo_template(self.echo):
            raise ValueError("echo must contain {text} twice and end with it")
        if not is_example_template(self.example_template or ""):
            raise ValueError("example_template must contain {query} and {response}")
        return self

    @model_validator(mode="after")
    def _check_frozen(self) -> ModelConfig:
        if self.frozen and self.lora is not None:
            raise ValueError("frozen is set, but lora freezes the whole base already. Remove one of both.")
        return self
