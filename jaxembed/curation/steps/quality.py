"""The step `quality`: drops texts by length, published rules and patterns, and rows by metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jaxembed.config.curation import QualityStepConfig
from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, StepOutcome, drop_texts, find_problems
from jaxembed.curation.steps.ratio_rules import RATIO_RULES
from jaxembed.data.filters import find_length_problem, find_where_mismatch
from jaxembed.errors import UserError

CountTokens = Callable[[str], int]
# Not symbols: letters, digits, white space, and combining marks, which re's \w does not match.
SYMBOL = re.compile(r"[^\w\s\u0300-\u036f\u0900-\u109f\u1780-\u17ff]|_")


def make_quality_step(config: QualityStepConfig) -> RowStep:
    """Return the step. Raise `UserError` if its tokenizer cannot be opened."""
    patterns = [re.compile(pattern) for pattern in config.drop_patterns]
    count_tokens = open_token_counter(config.tokenizer) if config.tokenizer else None

    def find_problem(text: str) -> str | None:
        if problem := find_length_problem([text], config):
            return problem
        if count_tokens and (problem := find_token_problem(count_tokens(text), config)):
            return problem
        if config.max_symbols is not None and compute_symbol_share(text) > config.max_symbols:
            return "more symbols than max_symbols"
        if problem := next(filter(None, (RATIO_RULES[rule](text) for rule in config.rules)), None):
            return problem
        return next((f"matches drop_patterns.{i}" for i, pattern in enumerate(patterns) if pattern.search(text)), None)

    def check(rows: Sequence[CuratedRow]) -> list[StepOutcome]:
        return [check_row(row) for row in rows]

    def check_row(curated: CuratedRow) -> StepOutcome:
        if mismatch := find_where_mismatch(curated.fields, config):
            return StepOutcome(None, (mismatch,))
        return drop_texts(curated, find_problems(curated, config.sides, find_problem))

    return check


def compute_symbol_share(text: str) -> float:
    """Return the share of the characters of a text that are neither letters, digits, marks, nor white space."""
    return len(SYMBOL.findall(text)) / max(len(text), 1)


def find_token_problem(count: int, config: QualityStepConfig) -> str | None:
    """Return why a text with this number of tokens is dropped, or None."""
    if count < config.min_tokens:
        return "shorter than min_tokens"
    return "longer than max_tokens" if config.max_tokens and count > config.max_tokens else None


def open_token_counter(model: str) -> CountTokens:
    """Return a function that counts the tokens of a text for a model, without special tokens."""
    from jaxembed.hub.resolve import find_base

    base = find_base(model)
    if not base.has_weights:
        raise UserError(f"tokenizer {model}: a preset has no tokenizer. Name a model that has one.")
    tokenizer = base.tokenizer()
    return lambda text: len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
