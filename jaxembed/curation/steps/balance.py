"""The step `balance`: a limit on the rows of each source, label, or value of a field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.curation import BalanceStepConfig, CurateConfig
from jaxembed.curation.steps.curated_row import CuratedRow, hash_row
from jaxembed.curation.steps.items import ItemRule
from jaxembed.curation.steps.record_files import RecordFiles
from jaxembed.data.equality import hash_exact_text
from jaxembed.data.schema import list_fields
from jaxembed.errors import UserError

DRAW_RECORD = np.dtype([("key", "<u8"), ("group", "<u8"), ("item", "<u8")])


class BalanceStep:
    """Draws rows of each group without replacement: those with the smallest hashes of the seed and their content.

    The draw does not depend on the order of the rows.
    """

    def __init__(self, step: BalanceStepConfig, folder: Path, max_rows: int, config: CurateConfig):
        """Start without rows. See `RecordFiles` for `folder`. `config` is the whole config."""
        self._config, self._seed = step, config.seed
        self._source_names = [source.display_name for source in config.sources]
        self._records = RecordFiles(folder, DRAW_RECORD, max_rows, config.memory_mb)
        self._num_items = 0
        self._has_field = step.by == "source"
        self._fields = ""  # of the first row, for errors
        self._sizes = Counter[int]()  # of the groups

    def close(self) -> None:
        """Close the files."""
        self._records.close()

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the rows."""
        records = []
        for row in rows:
            records.append((hash_row(row.fields, self._seed), self._hash_group(row), self._num_items))
            self._num_items += 1
        self._records.append(np.array(records, DRAW_RECORD))

    def _hash_group(self, curated: CuratedRow) -> int:
        field = self._config.by
        value = self._source_names[curated.source] if field == "source" else curated.fields.get(field)
        self._has_field |= value is not None
        self._fields = self._fields or list_fields(curated.fields)
        group = hash_group(value)
        self._sizes[group] += 1
        return group

    def _compute_limits(self) -> dict[int, int]:
        """Return the maximum number of rows of each group. Raise `UserError` for the weight of a group without rows."""
        config = self._config
        limits = {group: min(size, config.max_rows or size) for group, size in sorted(self._sizes.items())}
        if config.rows is None:
            return limits
        for value in config.weights:
            if hash_group(value) not in limits:
                raise UserError(f"balance by {config.by}: weights has {value!r}, but no row has this value. Remove it.")
        weights = {hash_group(value): weight for value, weight in config.weights.items()}
        shares = [weights.get(group, 1.0) * self._sizes[group] ** config.exponent for group in limits]
        return dict(zip(limits, divide_rows(config.rows, shares, list(limits.values())), strict=True))

    def find_dropped(self) -> np.ndarray:
        """Return whether each row is dropped, bool [I].

        Raises:
            UserError: No row has the field that rows are grouped by, or the value of a weight.
        """
        if not self._has_field and self._num_items:
            raise UserError(f"balance by {self._config.by}: no row has this field (the first row has {self._fields})")
        limits = self._compute_limits()
        dropped = np.zeros(self._num_items, bool)
        num_kept: dict[int, int] = {}  # by group
        max_key = int(self._config.share * 2**64)
        # Keys are uniformly distributed. Partitions come in ascending order, so each group is filled from its smallest key on.
        for records in self._records.iter_partitions():
            for record in records[np.lexsort((records["item"], records["key"]))]:
                key, group, item = record.tolist()
                is_kept = key < max_key and num_kept.get(group, 0) < limits[group]
                num_kept[group] = num_kept.get(group, 0) + is_kept
                dropped[item] = not is_kept
        return dropped


def hash_group(value: Any) -> int:
    """Return the hash of a value that rows are grouped by."""
    return int(hash_exact_text(str(value)).view("<u8")[0])


def divide_rows(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Divide rows among groups in proportion to their weights, at most `limits` each.

    The surplus of a group at its limit is divided among the other groups. Fractions are rounded by largest remainder.
    """
    parts, shares, maxima = np.zeros(len(weights)), np.asarray(weights, float), np.asarray(limits, float)
    is_open = shares > 0
    # Divide what is left among the open groups; fix groups at their limits, and repeat until none is above.
    while is_open.any():
        parts[is_open] = (total - parts[~is_open].sum()) * shares[is_open] / shares[is_open].sum()
        is_full = is_open & (parts >= maxima)
        if not is_full.any():
            break
        parts[is_full], is_open = maxima[is_full], is_open & ~is_full
    # Round down, then give one row each to the largest remainders.
    whole = np.floor(parts + 1e-9).astype(int)
    num_left_over = round(parts.sum()) - int(whole.sum())
    whole[np.argsort(whole - parts, kind="stable")[:num_left_over]] += 1
    return [int(rows) for rows in whole]


def make_balance_rule(config: BalanceStepConfig) -> ItemRule:
    """Return the rule of a step `balance`: the only item of a row is the row itself."""
    return ItemRule(lambda row: 1, f"not drawn by {config.by}", drops_texts=False)
