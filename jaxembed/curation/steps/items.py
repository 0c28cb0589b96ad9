"""Items: the texts that a step compares across all rows. Of several copies, the one with the largest rank is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxembed.config.curation import DuplicatesStepConfig, KeepRule
from jaxembed.curation.steps.curated_row import (
    CuratedRow,
    RowStep,
    StepOutcome,
    drop_texts,
    get_texts,
    hash_row,
)

RANK_BITS = 20
MAX_RANK = 2**RANK_BITS - 1


class AllRowsStep(Protocol):
    """A step that decides after it has seen all rows. Items are numbered in the order in which its rule lists them."""

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the items of rows."""

    def find_dropped(self) -> np.ndarray:
        """Return whether each item is dropped, bool [I]."""

    def close(self) -> None:
        """Close the files of the step."""


class Item(NamedTuple):
    """A text to compare, its rank (the largest is kept), and a hash of its row, which breaks ties."""

    text: str
    rank: int
    content: int


class ItemRule(NamedTuple):
    """The division of rows into items, and the effect of dropping an item.

    Attributes:
        count_items: Returns the number of items of a row.
        reason: Why an item is dropped.
        drops_texts: Whether an item of a row of pairs is one of its positives. Otherwise the row is dropped with the item.
    """

    count_items: Callable[[CuratedRow], int]
    reason: str
    drops_texts: bool


def list_items(curated: CuratedRow, config: DuplicatesStepConfig) -> list[Item]:
    """Return the items of a row by `config.of`: its query, its positives, or its pairs."""
    query, positives = get_texts(curated, "query")[0], get_texts(curated, "positives")
    content = hash_row(curated.fields)
    if config.of == "queries" or (config.of == "pairs" and not positives):
        length = len(query) + sum(map(len, positives))
        return [Item(query, compute_rank(curated, length, config.keep), content)]
    texts = [positive if config.of == "positives" else f"{query}\n{positive}" for positive in positives]
    return [Item(text, compute_rank(curated, len(text), config.keep), content) for text in texts]


def count_items(curated: CuratedRow, config: DuplicatesStepConfig) -> int:
    """Return the number of items that `list_items` returns."""
    if config.of == "queries":
        return 1
    num_positives = len(get_texts(curated, "positives"))
    return max(num_positives, 1) if config.of == "pairs" else num_positives


def compute_rank(curated: CuratedRow, length: int, rules: Sequence[KeepRule]) -> int:
    """Return the rank of a copy. The largest is kept. Earlier rules take precedence."""
    values: dict[str, int] = {
        "longest": length,
        "most_negatives": len(get_texts(curated, "negatives")),
        "source_priority": MAX_RANK - curated.source,
    }
    rank = 0
    for rule in rules:
        rank = rank << RANK_BITS | min(values[rule], MAX_RANK)
    return rank


def make_duplicates_rule(config: DuplicatesStepConfig) -> ItemRule:
    """Return the rule of a step `duplicates`."""
    kind = "" if config.match == "exact" else f"{config.match} "
    reason = f"{kind}copy of another of the {config.of}"
    return ItemRule(lambda row: count_items(row, config), reason, config.of != "queries")


def make_item_filter(rule: ItemRule, dropped: np.ndarray) -> RowStep:
    """Return the function that drops items.

    Args:
        rule: How rows are divided into items.
        dropped: Whether each item is dropped, bool [I]. Rows must come in the order in which they were collected.
    """
    numbers: Iterator[int] = iter(range(len(dropped)))

    def drop(curated: CuratedRow) -> StepOutcome:
        problems = [rule.reason if dropped[next(numbers)] else None for _ in range(rule.count_items(curated))]
        if not any(problems):
            return StepOutcome(curated.fields)
        if rule.drops_texts and curated.format == "pairs":
            return drop_texts(curated, {"positives": problems})
        return StepOutcome(None, (rule.reason,))

    return lambda rows: [drop(row) for row in rows]
