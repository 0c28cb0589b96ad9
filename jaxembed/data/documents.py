"""Weak pairs from documents: title and body, question and answer, section and paragraph, entity and description."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxembed.config import PairTemplate, SourceConfig
from jaxembed.config.data import TEMPLATE_FIELD
from jaxembed.data.equality import normalize_text
from jaxembed.data.filters import FILTER_KEYS, TOO_LONG, TOO_SHORT, describe_where, find_length_problem, find_where_mismatch
from jaxembed.data.rows import IndexedRows, RowsAbove, RowSchema
from jaxembed.data.sampling import ExampleSampler
from jaxembed.data.schema import Example, Row, check_document, is_text, list_fields
from jaxembed.errors import UserError

INCOMPLETE = "no template has all its fields"
SAME_SIDES = "query and positive are equal"
# Reasons for which a row makes no pair. If its templates fail for different reasons, the last of these counts.
DROP_REASONS = (INCOMPLETE, SAME_SIDES, TOO_SHORT, TOO_LONG)


def make_document_schema(config: SourceConfig) -> RowSchema:
    """Return the schema whose index value encodes which `pair_templates` of a source make a usable pair of a row.

    The value is the sum of 2^i over these templates i. If there is none, it is -1 - r, where r is the index of the
    reason in a list: first `DROP_REASONS`, then one reason for each field of `where`.
    """
    keys = config.model_dump_json(include={"pair_templates", "equality", *FILTER_KEYS})
    return RowSchema(f"pairs of documents by {keys}", check_document, lambda row: _encode_usable_templates(row, config))


class DocumentSampler(ExampleSampler):
    """Draws from rows with any fields. The source's `pair_templates` turn them into pairs (KaLM-Embedding 2.1: title and body).

    A row is used if it has the metadata of `where` and at least one template makes a pair of an allowed length. One of its
    pairs is drawn each time.
    """

    max_positives = 1

    def __init__(self, rows: IndexedRows, config: SourceConfig):
        """Find the usable rows.

        Args:
            rows: Rows with the source's `make_document_schema`.
            config: The source.

        Raises:
            UserError: A template makes no pair of any row.
        """
        self.rows = rows
        self._templates = config.pair_templates
        value_counts = {int(v): int(n) for v, n in zip(*np.unique(rows.index_values, return_counts=True), strict=True)}
        reasons = [*DROP_REASONS, *map(describe_where, config.where)]
        self.drop_counts = {reason: value_counts[-1 - i] for i, reason in enumerate(reasons) if -1 - i in value_counts}
        self._usable_rows = RowsAbove(rows.index_values, 1) if self.drop_counts else range(len(rows))
        for i, template in enumerate(self._templates):
            if not any(value > 0 and value >> i & 1 for value in value_counts):
                counts = "".join(f"; {reason}: {count:,}" for reason, count in self.drop_counts.items())
                raise UserError(
                    f"{config.path}: pair_templates.{i} makes no pair (no row has texts in all of "
                    f"{', '.join(sorted(template.fields))} and meets where, min_chars and max_chars{counts}; "
                    f"the first row has {list_fields(rows[0])})"
                )

    def __len__(self) -> int:
        return len(self._usable_rows)

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw one of the row's pairs."""
        pairs = self._make_pairs(index)
        query, positive = pairs[rng.integers(len(pairs))]
        return Example(query=query, positive=positive, negatives=(), positives=(positive,))

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield the pairs of all templates."""
        return ({"query": query, "pos": [positive]} for query, positive in self._make_pairs(index))

    def _make_pairs(self, index: int) -> list[tuple[str, str]]:
        """Return the usable pairs of a row, at least one."""
        row_index = self._usable_rows[index]
        row, usable = self.rows[row_index], int(self.rows.index_values[row_index])
        templates = [template for i, template in enumerate(self._templates) if usable >> i & 1]
        return [pair for template in templates if (pair := fill_template(template, row))]


def _encode_usable_templates(row: Row, config: SourceConfig) -> int:
    """Return the index value of a row (see `make_document_schema`)."""
    if mismatch := find_where_mismatch(row, config):
        return -1 - len(DROP_REASONS) - list(map(describe_where, config.where)).index(mismatch)
    pairs = [fill_template(template, row) for template in config.pair_templates]
    reasons = [INCOMPLETE if pair is None else _find_drop_reason(pair, config) for pair in pairs]
    usable = sum(2**i for i, reason in enumerate(reasons) if reason is None)
    return usable or -1 - max(map(DROP_REASONS.index, filter(None, reasons)))


def _find_drop_reason(pair: tuple[str, str], config: SourceConfig) -> str | None:
    """Return why a pair is not usable, one of `DROP_REASONS`, or None."""
    query, positive = pair if config.equality == "exact" else map(normalize_text, pair)
    return SAME_SIDES if query == positive else find_length_problem(pair, config)


def fill_template(template: PairTemplate, row: Row) -> tuple[str, str] | None:
    """Return the query and the positive of a row, or None if a field of the template is absent, empty or not a text."""
    if not all(is_text(row.get(field)) for field in template.fields):
        return None
    query, positive = (TEMPLATE_FIELD.sub(lambda match: row[match[1]], side) for side in (template.query, template.positive))
    return query, positive
