"""Records of fixed size on disk, partitioned by key, so that a step compares all texts in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAX_PARTITIONS = 4096
COPIES_IN_MEMORY = 6  # arrays of a partition's size that exist while it is sorted and compared
BUFFER_SHARE = 1 / 16  # of the memory, for records that are not on disk yet


class RecordFiles:
    """Records with a uint64 field `key`, in one file per range of keys. Keys are hashes, so the files have similar sizes.

    Records are buffered, because a file is only open while it is written: there may be more files than a process may open.
    """

    def __init__(self, folder: Path, dtype: np.dtype, max_records: int, memory_mb: int):
        """Start without records.

        Args:
            folder: Empty folder of the files.
            dtype: Type of a record.
            max_records: Expected maximum number of records, which determines the number of files.
            memory_mb: Memory in MiB for the records of one file, while they are compared.
        """
        needed = max_records * dtype.itemsize * COPIES_IN_MEMORY / (memory_mb * 2**20)
        self._bits = min(int(np.ceil(np.log2(max(needed, 1)))), MAX_PARTITIONS.bit_length() - 1)
        self._dtype = dtype
        self._paths = [folder / f"{i}.records" for i in range(2**self._bits)]
        self._buffer, self._num_buffered = list[np.ndarray](), 0
        self._max_buffered = int(memory_mb * 2**20 * BUFFER_SHARE / dtype.itemsize)

    def append(self, records: np.ndarray) -> None:
        """Append records."""
        self._buffer.append(records)
        self._num_buffered += len(records)
        if self._num_buffered >= self._max_buffered:
            self._write_buffer()

    def _write_buffer(self) -> None:
        """Append the buffered records to the files."""
        if not self._buffer:
            return
        records = np.concatenate(self._buffer)
        self._buffer, self._num_buffered = [], 0
        numbers = (records["key"] >> np.uint64(64 - self._bits) if self._bits else np.zeros(len(records))).astype(np.uint16)
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(len(self._paths) + 1))
        for path, start, end in zip(self._paths, starts, starts[1:], strict=False):
            if end > start:
                with path.open("ab") as file:
                    file.write(records[order[start:end]].tobytes())

    def iter_partitions(self) -> Iterator[np.ndarray]:
        """Yield the records of each range of keys, in ascending order of the ranges. Each file is removed once read."""
        self._write_buffer()
        for path in self._paths:
            if path.exists():
                yield np.fromfile(path, self._dtype)
                path.unlink()

    def close(self) -> None:
        """Forget the records that are not on disk. Files that were not read stay."""
        self._buffer = []
