"""The `mine` section: negatives found between stages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jaxembed.config.sections import Positive, Section

MiningRule = Literal["topk_perc_pos", "topk_margin_pos", "topk_abs", "top_k", "sampled_top_k", "window"]


class MineConfig(Section):
    rule: MiningRule = Field("topk_perc_pos", description="which candidates become negatives: docs/mining.md")
    negatives: Positive = Field(7, description="of a query")
    depth: Positive = Field(100, description="candidates of a query")
    window: tuple[Positive, Positive] = Field((50, 100), description="window: ranks, counted from 1")
    max_score: float = Field(0.7, description="topk_abs: the highest score of a negative")
    margin: float = Field(0.05, ge=0, description="topk_margin_pos: below the positive's score")
    share: float = Field(0.95, ge=0, le=1, description="topk_perc_pos: of the positive's score")

    @model_validator(mode="after")
    def _candidates_suffice(self) -> MineConfig:
        first, last = self.window
        if first > last:
            raise ValueError(f"window is {first} to {last}; expected two ranks, the first not after the last")
        if self.rule == "window" and self.negatives > 1 + last - first:
            raise ValueError(f"window is {first} to {last}, fewer ranks than the {self.negatives} negatives; raise its end")
        if self.rule != "window" and self.negatives > self.depth:
            raise ValueError(f"depth is {self.depth}, fewer candidates than the {self.negatives} negatives; raise it")
        return self
