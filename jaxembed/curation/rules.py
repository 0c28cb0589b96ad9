"""Which of a query's candidates become its negatives."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.config import MineConfig, MiningRule
from jaxembed.config.sections import parse_section
from jaxembed.errors import UserError

RULES = typing.get_args(MiningRule)
DEFAULTS = MineConfig()
SAMPLED = ("sampled_top_k", "window")
NUMBERS = [name for name in MineConfig.model_fields if name != "rule"]
# The rules that read a number, where not all do.
READ_BY = {
    "share": ("topk_perc_pos",), "margin": ("topk_margin_pos",), "max_score": ("topk_abs",), "window": ("window",),
    "depth": tuple(rule for rule in RULES if rule != "window"),
}  # fmt: skip


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
    """

    name: str = DEFAULTS.rule
    negatives: int = DEFAULTS.negatives
    depth: int = DEFAULTS.depth
    window: tuple[int, int] = DEFAULTS.window
    max_score: float = DEFAULTS.max_score
    margin: float = DEFAULTS.margin
    share: float = DEFAULTS.share

    @classmethod
    def of(cls, config: MineConfig) -> Rule:
        """The rule that a config names."""
        return cls(config.rule, *(getattr(config, name) for name in NUMBERS))

    @classmethod
    def given(cls, name: str, numbers: Mapping[str, Any]) -> Rule:
        """The rule with the numbers that options give. `UserError` where one is out of range, or of another rule."""
        for number in numbers:
            if name not in (rules := READ_BY.get(number, RULES)):
                told = f"{_option(number)} is not read by --rule {name}, but by {', '.join(rules)}"
                raise UserError(f"{told}; leave it out, or take another rule")
        return cls.of(parse_section(MineConfig, {"rule": name, **numbers}, f"--rule {name}"))

    @property
    def first(self) -> int:
        """The rank of the first candidate that is looked at."""
        return self.window[0] if self.name == "window" else 1

    @property
    def candidates(self) -> int:
        """The rank of the last one."""
        return self.window[1] if self.name == "window" else self.depth

    @property
    def limit(self) -> str:
        """The rule and the numbers that only it reads, as options name them."""
        own = {_option(name): np.ravel(getattr(self, name)) for name, rules in READ_BY.items() if rules == (self.name,)}
        return " ".join([f"--rule {self.name}", *(f"{option} {' '.join(map(str, of_it))}" for option, of_it in own.items())])

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
        places = np.flatnonzero(scores[: self.candidates] <= self.highest(positive))[self.first - 1 :]
        if self.name in SAMPLED and len(places) > self.negatives:
            places = np.sort(rng.choice(places, self.negatives, replace=False))
        return places[: self.negatives]


def _option(number: str) -> str:
    return f"--{number.replace('_', '-')}"
