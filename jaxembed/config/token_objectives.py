"""The objectives that predict tokens. The other objectives compare vectors of texts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

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
