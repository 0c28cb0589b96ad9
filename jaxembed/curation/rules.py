"""Apply the rules of the `mine` section: choose the negatives of a query among its candidates."""

from __future__ import annotations

import numpy as np

from jaxembed.config.mining import RULES_BY_KEY, MineConfig


def choose_negatives(config: MineConfig, scores: np.ndarray, positive_score: float, rng: np.random.Generator) -> np.ndarray:
    """Choose negatives among the candidates of a query.

    Args:
        config: The rule and its limits.
        scores: Scores [C] of the candidates in rank order.
        positive_score: Score of the positive, the lowest one of several.
        rng: Random generator for the rules that sample.

    Returns:
        Indices of the negatives among the candidates, ascending. There are fewer than `config.negatives` if fewer
        candidates pass the rule.
    """
    is_eligible = scores[: config.last_rank] <= config.compute_max_negative_score(positive_score)
    indices = np.flatnonzero(is_eligible)[config.first_rank - 1 :]
    if config.is_sampled and len(indices) > config.negatives:
        indices = np.sort(rng.choice(indices, config.negatives, replace=False))
    return indices[: config.negatives]


def format_rule_options(config: MineConfig) -> str:
    """Return the rule, and the limit that only this rule reads, as command-line options."""
    options = [f"--rule {config.rule}"]
    for key, rules in RULES_BY_KEY.items():
        if rules == (config.rule,):
            options.append(f"{option_name(key)} {' '.join(map(str, np.ravel(getattr(config, key))))}")
    return " ".join(options)


def option_name(key: str) -> str:
    """Return the command-line option of a key of the section."""
    return f"--{key.replace('_', '-')}"
