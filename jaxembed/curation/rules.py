"""Which of a query's candidates become its negatives."""

from __future__ import annotations

import dataclasses
import math
import typing

import numpy as np

from jaxembed.config import MineConfig, MiningRule
from jaxembed.errors import UserError

RULES = typing.get_args(MiningRule)
DEFAULTS = MineConfig()
SAMPLED = ("sampled_top_k", "window")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How negatives are chosen among candidates that are sorted, best first, and hold no positive.

    The best that score at most

    - `top_k`: anything (ANCE, arXiv:2007.00808, takes such);
    - `topk_abs`: `max_score`;
    - `topk_margin_pos`: the positive's score - `margin`;
    - `topk_perc_pos`: `share` of the positive's score, or as far below a negative one

    (NV-Retriever, arXiv:2407.15831, which names these four); or a random sample

    - `sampled_top_k`: of the first `depth` (also NV-Retriever's);
    - `window`: of ranks A to B, counted from 1 (KaLM-Embedding-V2, arXiv:2506.20923: 7 of 50 to 100).

    `UserError` where a number is out of range.
    """

    name: str = DEFAULTS.rule
    negatives: int = DEFAULTS.negatives
    depth: int = DEFAULTS.depth
    window: tuple[int, int] = DEFAULTS.window
    max_score: float = DEFAULTS.max_score
    margin: float = DEFAULTS.margin
    share: float = DEFAULTS.share

    def __post_init__(self) -> None:
        first, last = self.window
        if not 1 <= first <= last:
            raise UserError(f"--window is {first} {last}; expected two ranks, counted from 1, the first not after the last")
        if self.negatives < 1:
            raise UserError(f"--negatives is {self.negatives}; expected 1 or more")
        if self.candidates < self.negatives:
            raise UserError(f"--depth is {self.depth}, less than the {self.negatives} --negatives asked for; raise it")

    @classmethod
    def of(cls, config: MineConfig) -> Rule:
        """The rule that a config names."""
        return cls(config.rule, *(value for name, value in config if name != "rule"))

    @property
    def candidates(self) -> int:
        """How many candidates of a query are looked at."""
        return self.window[1] if self.name == "window" else self.depth

    def highest(self, positive: float) -> float:
        """The highest score of a negative, given the positive's."""
        limits = {
            "topk_abs": self.max_score,
            "topk_margin_pos": positive - self.margin,
            "topk_perc_pos": positive - (1 - self.share) * abs(positive),
        }
        return limits.get(self.name, math.inf)

    def choose(self, scores: np.ndarray, positive: float, rng: np.random.Generator) -> np.ndarray:
        """Places of the negatives among candidates with these scores, in their order; fewer where fewer fit."""
        places = np.flatnonzero(scores[: self.candidates] <= self.highest(positive))
        if self.name == "window":
            places = places[self.window[0] - 1 :]
        if self.name in SAMPLED and len(places) > self.negatives:
            places = np.sort(rng.choice(places, self.negatives, replace=False))
        return places[: self.negatives]
