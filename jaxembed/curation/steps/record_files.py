"""Records of fixed size on disk, partitioned by key, so that a step compares all texts in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAX_PARTITIONS = 256
COPIES_IN_MEMORY = 6  # arrays of a partition's size that exist while it is sorted and compared


class RecordFiles:
    """Records with a uint64 field `key`, in one file per range of keys. Keys are hashes, so the files have similar sizes."""

    def __init__(self, folder: Path, dtype: np.dtype, max_records: int, memory_mb: int):
        """Create the files.

        Args:
            folder: Empty folder of the files.
            dtype: Type of a record.
            max_records: Expected maximum number of records, which determines the number of files.
            memory_mb: Memory in MiB for the records of one file, while they are compared.
        """
        needed = max_records * dtype.itemsize * COPIES_IN_MEMORY / (memory_mb * 2**20)
        self._bits = min(int(np.ceil(np.log2(max(needed, 1)))), MAX_PARTITIONS.bit_length() - 1)
        self._dtype = dtype
        self._files = [(folder / f"{i}.records").open("w+b") for i in range(2**self._bits)]

    def append(self, records: np.ndarray) -> None:
        """Append records."""
        if not self._bits:
            self._files[0].write(records.tobytes())
            return
        numbers = records["key"] >> np.uint64(64 - self._bits)
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(len(self._files) + 1, dtype=np.uint64))
        for file, start, end in zip(self._files, starts, starts[1:], strict=False):
            if end > start:
                file.write(records[order[start:end]].tobytes())

    def iter_partitions(self) -> Iterator[np.ndarray]:
        """Yield the records of each range of keys, in ascending order of the ranges. Each file is removed once read."""
        for file in self._files:
            file.seek(0)
            yield np.frombuffer(file.read(), self._dtype)
            file.close()
            Path(file.name).unlink()

    def close(self) -> None:
        """Close the files that were not read."""
        for file in self._files:
            file.close()
