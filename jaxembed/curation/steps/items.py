"""Items: the texts that a step compares across all rows. Of several copies, the one with the highest priority is kept."""

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

RULE_BITS = 20  # of a priority, for the value of each rule
MAX_RULE_VALUE = 2**RULE_BITS - 1


class AllRowsStep(Protocol):
    """A step that decides after it has seen all rows. Items are numbered in the order in which its rule lists them."""

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the items of rows."""

    def find_dropped(self) -> np.ndarray:
        """Return whether each item is dropped, bool [I]."""

    def close(self) -> None:
        """Close the files of the step."""


class Item(NamedTuple):
    """A text to compare.

    Attributes:
        texts: Its texts: one, or a query and a positive.
        priority: Of several copies, the one with the highest priority is kept.
        row_hash: Hash of the row. Of equal priorities, the smallest one is kept.
    """

    texts: tuple[str, ...]
    priority: int
    row_hash: int

    @property
    def text(self) -> str:
        """All texts, one below the other."""
        return "\n".join(self.texts)


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
    row_hash = hash_row(curated.fields)
    if config.of == "queries" or (config.of == "pairs" and not positives):
        length = len(query) + sum(map(len, positives))
        return [Item((query,), compute_priority(curated, length, config.keep), row_hash)]
    prefix = () if config.of == "positives" else (query,)
    return [
        Item((*prefix, positive), compute_priority(curated, sum(map(len, prefix)) + len(positive), config.keep), row_hash)
        for positive in positives
    ]


def count_items(curated: CuratedRow, config: DuplicatesStepConfig) -> int:
    """Return the number of items that `list_items` returns."""
    if config.of == "queries":
        return 1
    num_positives = len(get_texts(curated, "positives"))
    return max(num_positives, 1) if config.of == "pairs" else num_positives


def compute_priority(curated: CuratedRow, length: int, rules: Sequence[KeepRule]) -> int:
    """Return the priority of a copy. The copy with the highest one is kept. Earlier rules take precedence."""
    values: dict[str, int] = {
        "longest": length,
        "most_negatives": len(get_texts(curated, "negatives")),
        "source_priority": MAX_RULE_VALUE - curated.source,
    }
    priority = 0
    for rule in rules:
        priority = priority << RULE_BITS | min(values[rule], MAX_RULE_VALUE)
    return priority


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
