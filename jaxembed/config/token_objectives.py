"""The objectives that predict tokens. The other objectives compare vectors of texts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from jaxembed.config.model import AttentionKind
from jaxembed.config.objective import ObjectiveConfig
from jaxembed.config.sections import Positive


class TokenObjectiveConfig(ObjectiveConfig):
    """The keys of all objectives that predict tokens."""

    source_format: ClassVar[str]  # format of the sources that the objective trains on
    source_rows: ClassVar[str]  # content of their rows, for errors

    batch_size: Positive | None = Field(
        None, description="Texts per step of this objective, over all devices. Default: train.batch_size."
    )
    group: Positive | None = Field(
        None,
        description="Number of texts whose predicted tokens are averaged together; the loss is the mean over such groups. "
        "1: every text counts the same (sample level). Default: all texts of a step, so every token counts the same (token "
        "level).",
    )

    def select_attention(self, model_attention: AttentionKind) -> AttentionKind:
        """Return the attention mask of the objective's texts, given that of the model."""
        return model_attention


class MaskedPredictionConfig(TokenObjectiveConfig):
    """Masked next-token prediction (LLM2Vec, BehnamGhader et al. 2024), and masked diffusion (LLaDA, Nie et al. 2025)."""

    source_format: ClassVar[str] = "text"
    source_rows: ClassVar[str] = 'rows with a "text"'

    name: Literal["mntp"] = "mntp"
    mask_rate: float = Field(0.2, gt=0, le=1, description="Probability that a token is predicted. Special tokens never are.")
    max_mask_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Draw the rate of each text uniformly between mask_rate and this rate (masked diffusion: 1). "
        "Default: every text has mask_rate.",
    )
    mask_rule: Literal["bert", "all"] = Field(
        "bert",
        description="Token that the model reads in place of a predicted one. bert: the mask token (80%), a random token "
        "(10%), or the token itself (10%). all: always the mask token.",
    )
    mask_token: str | None = Field(
        None,
        description="Token that stands for a masked one. Default: the tokenizer's mask token, otherwise _ (LLM2Vec), "
        "otherwise its unknown token.",
    )
    predict_from: Literal["previous", "same"] = Field(
        "previous",
        description="Hidden state that predicts a token: that of the previous token, as in pretraining (LLM2Vec), or of "
        "the same token.",
    )
    token_weight: Literal["equal", "inverse_rate"] = Field(
        "equal",
        description="equal: the mean over predicted tokens. inverse_rate: each is weighted with 1 / (rate of its text), and "
        "the sum is divided by the number of tokens that could be predicted (masked diffusion).",
    )

    @model_validator(mode="after")
    def _check_rates(self) -> MaskedPredictionConfig:
        if self.max_mask_rate is not None and self.max_mask_rate < self.mask_rate:
            raise ValueError(f"max_mask_rate is {self.max_mask_rate:g}, less than mask_rate, {self.mask_rate:g}. Swap them.")
        return self


class CausalLMConfig(TokenObjectiveConfig):
    """Next-token prediction on the answers of conversations, the generative objective of GRIT (Muennighoff et al. 2024)."""

    source_format: ClassVar[str] = "chat"
    source_rows: ClassVar[str] = 'rows with "messages", or with "prompt" and "response"'

    name: Literal["causal_lm"] = "causal_lm"
    attention: Literal["causal", "prefix_lm"] = Field(
        "causal",
        description="Attention mask of conversations, instead of model.attention. causal: a token sees itself and the tokens "
        "before it. prefix_lm: the tokens before the last answer also see each other, and only that answer is predicted.",
    )
    average: Literal["tokens", "texts"] = Field(
        "tokens",
        description="What the summed loss of a group is divided by. tokens: its predicted tokens. texts: its conversations, so "
        "that a token has the same weight in every batch (GritLM's loss_gen_type token).",
    )
    kl_to_base: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL divergence from the base's distribution of each predicted token to the model's, which "
        "keeps answers near those of the base. Needs model.lora, whose base is frozen.",
    )
    system_template: str = Field("<|system|>\n{text}\n", description="How a system message is written.")
    user_template: str = Field("<|user|>\n{text}\n", description="How a message of the user is written.")
    assistant_template: str = Field(
        "<|assistant|>\n{text}",
        description="How an answer is written. Ends in {text}. Only the answer and its end are predicted.",
    )
    answer_end: str | None = Field(
        None, description="Text after each answer, which is predicted too. Default: the EOS token of the tokenizer."
    )
    turn_separator: str = Field("\n", description="Text between the end of an answer and the next message.")

    @field_validator("system_template", "user_template", "assistant_template")
    @classmethod
    def _check_template(cls, template: str, info: ValidationInfo) -> str:
        is_answer = info.field_name == "assistant_template"
        if template.count("{text}") != 1 or (is_answer and not template.endswith("{text}")):
            requirement = "at its end" if is_answer else "once"
            raise ValueError(f"is {template!r} (expected a template with {{text}} {requirement})")
        return template

    def select_attention(self, model_attention: AttentionKind) -> AttentionKind:
        """Return the attention mask of conversations."""
        return self.attention

    def write_prompt(self, question: str) -> str:
        """Return a question as the model reads it, up to where its answer begins."""
        return self.user_template.replace("{text}", question) + self.assistant_template.removesuffix("{text}")
