"""Accept the rows that are valid, new, and within the quotas."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxembed.config.synthesis import LANGUAGE, LENGTH, QuotaConfig, SynthesisConfig, TaskConfig
from jaxembed.curation.curation_sources import iter_curated_rows, open_curated_sources
from jaxembed.curation.steps.curated_row import CuratedRow, get_texts
from jaxembed.data.equality import exclude_equal
from jaxembed.data.schema import Row
from jaxembed.data.sources import IDENTIFYING_FIELDS, ROW_SCHEMAS
from jaxembed.errors import UserError
from jaxembed.synthesis.drafts import Draft, fill_field, fill_template
from jaxembed.synthesis.novelty import SeenTexts, open_language_identifier

UNKNOWN_GROUP = "unknown"  # the quota group of texts whose language cannot be identified
EQUAL_TEXTS = "query, positives and negatives are not all different"
DUPLICATE_ROW = "copy of an earlier row"


@dataclasses.dataclass(frozen=True)
class AcceptedRow:
    """A row that goes to the output.

    Attributes:
        row: The training row.
        draft: The draft it was made from.
    """

    row: Row
    draft: Draft


def find_format(task: TaskConfig) -> str:
    """Return the format of a task's rows. Raise `UserError` if no format has its fields."""
    formats = {name: fields for name, fields in IDENTIFYING_FIELDS.items() if name != "chat"}
    for name, fields in formats.items():
        if fields <= set(task.row):
            return name
    expected = "; ".join(", ".join(sorted(fields)) for fields in formats.values())
    raise UserError(f"task {task.name}: row has {', '.join(task.row)} (expected at least the fields of one format: {expected})")


class KnownQueries:
    """The queries of all rows so far, and of existing training files."""

    def __init__(self, config: SynthesisConfig, cache: Path, where: str):
        """Read the existing files. Raise `UserError` if one cannot be read, or rensa is not installed."""
        self._seen = SeenTexts(config.duplicates, config.threshold) if config.duplicates != "none" else None
        if config.existing and self._seen:
            for row in iter_curated_rows(open_curated_sources(config.existing, cache, where)):
                self._seen.add(*get_compared_texts(row))

    def add(self, row: CuratedRow) -> bool:
        """Return whether the query of a row is new, and remember it."""
        return self._seen is None or self._seen.add(*get_compared_texts(row))


def get_compared_texts(row: CuratedRow) -> list[str]:
    """Return the texts that copies of a row share: its query, or both texts of a pair with a score or an NLI label."""
    texts = get_texts(row, "query")
    return [*texts, *get_texts(row, "positives")] if row.format == "scored_pairs" else texts


class RowRules:
    """Decides which rows of a task are accepted.

    Attributes:
        format: Format of the rows.
        rejected: Number of rejected rows by reason.
        quota_counts: For each quota, the number of accepted rows by group.
    """

    def __init__(self, task: TaskConfig, known_queries: KnownQueries, target_rows: int | None):
        """Start without rows.

        Args:
            task: The section of the task.
            known_queries: Queries of earlier rows and of existing training files.
            target_rows: Number of rows to write; None for no limit.
        """
        self.format = find_format(task)
        self.rejected = Counter[str]()
        self.quota_counts: list[Counter[str]] = [Counter() for _ in task.quotas]
        self._task, self._known_queries, self._target_rows = task, known_queries, target_rows

    def accept(self, draft: Draft) -> AcceptedRow | None:
        """Return the row of a draft and count it, or return None if it is rejected."""
        row_values = {str(field): fill_field(template, draft) for field, template in self._task.row.items()}
        row = {field: value.strip() if isinstance(value, str) else value for field, value in row_values.items()}
        if problem := self._find_problem(row):
            self.rejected[problem] += 1
            return None
        groups = [self._find_group(quota, row, draft) for quota in self._task.quotas]
        for quota, group, counts in zip(self._task.quotas, groups, self.quota_counts, strict=True):
            if counts[group] >= self._compute_max_rows(quota):
                self.rejected[f"quota of {quota.by}"] += 1
                return None
        if not self._known_queries.add(self._to_curated_row(row)):
            self.rejected[DUPLICATE_ROW] += 1
            return None
        for group, counts in zip(groups, self.quota_counts, strict=True):
            counts[group] += 1
        return AcceptedRow(row, draft)

    def _find_problem(self, row: dict[str, Any]) -> str | None:
        if problem := ROW_SCHEMAS[self.format].check(row):
            return f"not a valid row: {problem}"
        texts = list_texts(row)
        if not all(map(is_unicode, texts)):
            return "not valid Unicode"
        if self.format in ("pairs", "scored_pairs") and len(exclude_equal(texts, ())) < len(texts):
            return EQUAL_TEXTS
        return None

    def _to_curated_row(self, row: dict[str, Any]) -> CuratedRow:
        if self.format == "nli":
            return CuratedRow(0, 0, "scored_pairs", {"sentence1": row["premise"], "sentence2": row["hypothesis"]})
        return CuratedRow(0, 0, self.format, row)

    def _find_group(self, quota: QuotaConfig, row: dict[str, Any], draft: Draft) -> str:
        curated = self._to_curated_row(row)
        document = (get_texts(curated, "positives") or get_texts(curated, "query"))[0]
        if quota.by == LANGUAGE:
            return open_language_identifier()(document) or UNKNOWN_GROUP
        if quota.by == LENGTH:
            return f"{2 ** (len(document).bit_length() - 1):,} characters or more"
        return fill_template(quota.by, draft)

    def _compute_max_rows(self, quota: QuotaConfig) -> int:
        if quota.max_rows is not None:
            return quota.max_rows
        assert quota.max_share is not None and self._target_rows is not None
        return max(math.floor(quota.max_share * self._target_rows + 1e-9), 1)


def list_texts(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row without its prompt: query, positives and negatives, or sentences."""
    names = ("query", "text", "sentence1", "sentence2", "premise", "hypothesis", "pos", "neg")
    values: Sequence[Any] = [row[name] for name in names if name in row]
    return [text for value in values for text in (value if isinstance(value, list) else [value])]


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8, which lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
