"""ArrayRecord files: JSON objects as records, each read by its number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError, brief

ONE_BY_ONE = "readahead_buffer_size:0"
AT_ONCE = 1024  # records read together where all are


class ArrayRecordFile:
    """An ArrayRecord file; an address is the number of a record."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordReader

        self.name = str(path)
        self._reader = ArrayRecordReader(self.name, options=ONE_BY_ONE, file_reader_buffer_size=2**15)
        if not self._reader.ok():
            raise UserError(f"{path}: no whole ArrayRecord file; it may be cut off: write or fetch it again")
        self.extent = self._reader.num_records()

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Address, file and record, and content of each record."""
        for start in range(0, self.extent, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, self.extent))
            for number, content in zip(numbers, self._read(list(numbers)), strict=True):
                yield number, f"{self.name}: record {number + 1}", content

    def read(self, address: int) -> Any:
        """The content of the record there."""
        return self._read([address])[0]

    def _read(self, numbers: list[int]) -> Any:
        try:
            return self._reader.read(numbers)
        except RuntimeError as error:
            told = f"record {numbers[0] + 1} or a record after it is damaged ({brief(error)})"
            raise UserError(f"{self.name}: {told}") from None


def write_array_record(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON, one a record, in groups of one, so that each is read alone."""
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row, ensure_ascii=False).encode())
        writer.close()
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({brief(error)})") from error
