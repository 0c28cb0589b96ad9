"""The step `duplicates`, exact: drops copies of texts that are equal by the rule of training (`data.equality`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxembed.config.curation import DuplicatesStepConfig
from jaxembed.curation.steps.curated_row import CuratedRow
from jaxembed.curation.steps.items import list_items
from jaxembed.curation.steps.record_files import RecordFiles
from jaxembed.data.equality import hash_exact_text, join_normalized

COPY_RECORD = np.dtype([("key", "<u8"), ("priority", "<u8"), ("row_hash", "<u8"), ("item", "<u8")])


class ExactDuplicatesStep:
    """Keeps one of all items with equal texts: the one with the highest priority, then the smallest hash of its row.

    Which row is kept does not depend on the order of the rows.
    """

    def __init__(self, config: DuplicatesStepConfig, folder: Path, max_rows: int, memory_mb: int):
        """Start without rows. See `RecordFiles` for `folder` and `memory_mb`."""
        self._config = config
        self._records = RecordFiles(folder, COPY_RECORD, max_rows, memory_mb)
        self._num_items = 0

    def close(self) -> None:
        """Close the files."""
        self._records.close()

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the items of rows."""
        records = []
        for row in rows:
            prefix = "" if self._config.across_sources else f"{row.source} "
            for item in list_items(row, self._config):
                key = int(hash_exact_text(prefix + join_normalized(item.texts)).view("<u8")[0])
                records.append((key, item.priority, item.row_hash, self._num_items))
                self._num_items += 1
        self._records.append(np.array(records, COPY_RECORD))

    def find_dropped(self) -> np.ndarray:
        """Return whether each item is dropped, bool [I]."""
        dropped = np.zeros(self._num_items, bool)
        for records in self._records.iter_partitions():
            order = np.lexsort((records["item"], records["row_hash"], ~records["priority"], records["key"]))
            keys = records["key"][order]
            dropped[records["item"][order[1:]][keys[1:] == keys[:-1]]] = True
        return dropped
