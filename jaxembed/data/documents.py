"""Weak pairs out of documents: title and body, question and answer, section and paragraph, entity and description."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxembed.config import PairTemplate, SourceConfig
from jaxembed.config.data import FIELD
from jaxembed.data.rows import Rows, RowsAbove, RowSchema
from jaxembed.data.sampling import ExampleSampler
from jaxembed.data.schema import Example, Row, check_document, fields_of, is_text
from jaxembed.errors import UserError

INCOMPLETE = "no template has all its fields"
REASONS = (INCOMPLETE, "query and positive are equal", "shorter than min_chars", "longer than max_chars")


def document_shape(config: SourceConfig) -> RowSchema:
    """What is kept of a row: the sum of 2^i over the `pair_templates` i that make a good pair of it, or -1 - the number of the
    reason why none does.
    """
    keys = config.model_dump_json(include={"pair_templates", "where", "min_chars", "max_chars"})
    return RowSchema(f"documents by {keys}", check_document, lambda row: _kept(row, config))


class Documents(ExampleSampler):
    """Rows of any fields, from which a source's `pair_templates` make pairs (KaLM-Embedding 2.1: title and body).

    A row is kept that has the metadata of `where` and makes a pair of the right length by one template at least. One of
    those pairs is drawn at every visit.
    """

    most_positives = 1

    def __init__(self, rows: Rows, config: SourceConfig):
        """`rows` are of the config's shape (`document_shape`). `UserError` where a template makes no pair of any of them."""
        self.rows = rows
        self._templates = config.pair_templates
        found = {int(value): int(count) for value, count in zip(*np.unique(rows.numbers, return_counts=True), strict=True)}
        reasons = [*REASONS, *(f"where {field}" for field in config.where)]
        self.dropped = {reason: found[-1 - i] for i, reason in enumerate(reasons) if -1 - i in found}
        self._usable = RowsAbove(rows.numbers, 1) if self.dropped else range(len(rows))
        for i, template in enumerate(self._templates):
            if not any(value > 0 and value >> i & 1 for value in found):
                counts = "".join(f"; {reason}: {count:,}" for reason, count in self.dropped.items())
                raise UserError(
                    f"{config.path}: pair_templates.{i} makes no pair: no row has texts in all of "
                    f"{', '.join(sorted(template.fields))} and is as where, min_chars and max_chars say{counts}; the first row "
                    f"has {fields_of(rows[0])}"
                )

    def __len__(self) -> int:
        return len(self._usable)

    def draw(self, index: int, rng: np.random.Generator, negatives: int) -> Example:
        pairs = self._pairs(index)
        query, positive = pairs[rng.integers(len(pairs))]
        return Example(query, positive, (), (positive,))

    def pairs(self, index: int, seed: int, most: int | None) -> Iterator[Row]:
        """Those of all templates."""
        return ({"query": query, "pos": [positive]} for query, positive in self._pairs(index))

    def _pairs(self, index: int) -> list[tuple[str, str]]:
        """The good pairs of a kept row, one at least."""
        number = self._usable[index]
        row, usable = self.rows[number], int(self.rows.numbers[number])
        return [pair for i, template in enumerate(self._templates) if usable >> i & 1 and (pair := filled(template, row))]


def _kept(row: Row, config: SourceConfig) -> int:
    """The number of a row, as `document_shape` says."""
    for i, (field, allowed) in enumerate(config.where.items()):
        if row.get(field) not in allowed:
            return -1 - len(REASONS) - i
    pairs = [filled(template, row) for template in config.pair_templates]
    problems = [INCOMPLETE if pair is None else _wrong(pair, config) for pair in pairs]
    good = sum(2**i for i, problem in enumerate(problems) if problem is None)
    return good or -1 - max(map(REASONS.index, filter(None, problems)))


def _wrong(pair: tuple[str, str], config: SourceConfig) -> str | None:
    """What is wrong with a pair, one of `REASONS`, or None."""
    shorter, longer = sorted(map(len, pair))
    if pair[0] == pair[1]:
        return REASONS[1]
    if shorter < config.min_chars:
        return REASONS[2]
    return REASONS[3] if config.max_chars and longer > config.max_chars else None


def filled(template: PairTemplate, row: Row) -> tuple[str, str] | None:
    """Query and positive of a row; None where one of the fields is absent, empty or no text."""
    if not all(is_text(row.get(field)) for field in template.fields):
        return None
    query, positive = (FIELD.sub(lambda found: row[found[1]], side) for side in (template.query, template.positive))
    return query, positive
