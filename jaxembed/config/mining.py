"""The `mine` section: how hard negatives are selected among the documents nearest to a query."""

from __future__ import annotations

import math
import typing
from typing import Literal

from pydantic import Field, model_validator

from jaxembed.config.fields import MAX_INTEGER
from jaxembed.config.sections import Positive, Section

MiningRule = Literal["topk_perc_pos", "topk_margin_pos", "topk_abs", "top_k", "sampled_top_k", "window"]
MINING_RULES: tuple[str, ...] = typing.get_args(MiningRule)
SAMPLED_RULES = ("sampled_top_k", "window")
STAGE_KEYS = frozenset({"model", "sources"})  # only for stages; the command has arguments instead
# Keys that only some rules read, with these rules. All rules read the other keys.
RULES_BY_KEY = {
    "share": ("topk_perc_pos",), "margin": ("topk_margin_pos",), "max_score": ("topk_abs",), "window": ("window",),
    "depth": tuple(rule for rule in MINING_RULES if rule != "window"),
}  # fmt: skip


class MineConfig(Section):
    """How negatives are selected among candidates that are sorted by score, best first, and contain no positive.

    Four rules take the best candidates that score at most:

    - `top_k`: anything (ANCE, arXiv:2007.00808).
    - `topk_abs`: `max_score`.
    - `topk_margin_pos`: the positive's score minus `margin`.
    - `topk_perc_pos`: `share` of the positive's score s; if s is negative, s - (1 - `share`) |s|.

    NV-Retriever (arXiv:2407.15831) names these four. Two rules take a random sample:

    - `sampled_top_k`: of the first `depth` candidates (NV-Retriever).
    - `window`: of the ranks A to B, counted from 1 (KaLM-Embedding, arXiv:2501.01028, section 3.1: 7 of ranks 50 to 100).

    With any rule, `consistency_top_k` removes positives that the same search does not find.
    """

    rule: MiningRule = Field(
        "topk_perc_pos", description="Rule that selects negatives among the candidates (docs/guides/mining.md)."
    )
    negatives: Positive = Field(7, description="Maximum number of mined negatives per query.")
    depth: Positive = Field(100, description="Number of candidates per query. Rule window does not read it.")
    window: tuple[Positive, Positive] = Field((50, 100), description="First and last rank, counted from 1. For rule window.")
    max_score: float = Field(0.7, description="Maximum score of a negative. For rule topk_abs.")
    margin: float = Field(0.05, ge=0, description="Minimum distance below the positive's score. For rule topk_margin_pos.")
    share: float = Field(0.95, ge=0, le=1, description="Maximum share of the positive's score. For rule topk_perc_pos.")
    consistency_top_k: int = Field(
        0,
        ge=0,
        le=MAX_INTEGER,
        description="Drop a positive if this many other documents score higher, and examples that have no positive left "
        "(KaLM: 50). 0: keep all.",
    )
    model: str = Field(
        "",
        description="Model that finds the negatives of a stage: a run directory, folder, or hub id. Default: the model that "
        "the stage starts with.",
    )
    sources: tuple[str, ...] = Field(
        (), description="Names of the sources of a stage to mine for. Default: all whose rows can be mined."
    )

    @model_validator(mode="after")
    def _check_candidates(self) -> MineConfig:
        first, last = self.window
        if first > last:
            raise ValueError(f"window is {first} to {last} (expected two ranks in ascending order)")
        if self.rule == "window" and self.negatives > 1 + last - first:
            raise ValueError(f"window is {first} to {last}, fewer ranks than the {self.negatives} negatives. Raise its end.")
        if self.rule != "window" and self.negatives > self.depth:
            raise ValueError(f"depth is {self.depth}, fewer candidates than the {self.negatives} negatives. Raise it.")
        return self

    def applies_to(self, source: str) -> bool:
        """Return whether to mine negatives for the source of this name."""
        return not self.sources or source in self.sources

    @property
    def first_rank(self) -> int:
        """Rank of the first candidate that may become a negative, counted from 1."""
        return self.window[0] if self.rule == "window" else 1

    @property
    def last_rank(self) -> int:
        """Rank of the last candidate that may become a negative: the number of candidates that the rule needs."""
        return self.window[1] if self.rule == "window" else self.depth

    @property
    def is_sampled(self) -> bool:
        """Whether negatives are drawn at random, instead of the best ones."""
        return self.rule in SAMPLED_RULES

    def compute_max_negative_score(self, positive_score: float) -> float:
        """Return the maximum score of a negative, given the positive's score."""
        limits = {
            "topk_abs": self.max_score,
            "topk_margin_pos": positive_score - self.margin,
            "topk_perc_pos": positive_score - (1 - self.share) * abs(positive_score),
        }
        return limits.get(self.rule, math.inf)
