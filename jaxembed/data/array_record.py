"""ArrayRecord files: records of JSON objects, read at random by number."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError, summarize

NO_READAHEAD = "readahead_buffer_size:0"  # records are read one at a time, in a random order
READ_BUFFER_BYTES = 2**15
RECORDS_PER_READ = 1024  # of a scan


class ArrayRecordFile:
    """An ArrayRecord file. An address is the number of a record, from 0."""

    def __init__(self, path: Path):
        """Open the file. No record is read yet."""
        from array_record.python.array_record_module import ArrayRecordReader

        self.name = str(path)
        self._reader = ArrayRecordReader(self.name, options=NO_READAHEAD, file_reader_buffer_size=READ_BUFFER_BYTES)
        if not self._reader.ok():
            raise UserError(f"{path}: not a complete ArrayRecord file. If it is truncated, write or download it again.")
        self.address_limit = self._reader.num_records()

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, file and record number, and content of every record."""
        for start in range(0, self.address_limit, RECORDS_PER_READ):
            addresses = range(start, min(start + RECORDS_PER_READ, self.address_limit))
            for address, content in zip(addresses, self._read_records(list(addresses)), strict=True):
                yield address, self.locate(address), content

    def read(self, address: int) -> Any:
        """Return the content of the record at an address."""
        return self._read_records([address])[0]

    def locate(self, address: int) -> str:
        """Return file and number of the record at an address, for errors."""
        return f"{self.name}: record {address + 1}"

    def _read_records(self, addresses: list[int]) -> Any:
        try:
            return self._reader.read(addresses)
        except RuntimeError as error:
            raise UserError(f"{self.locate(addresses[0])} or a later record is damaged ({summarize(error)})") from None


def write_array_record(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one per record.

    Each group holds one record, so that single records can be read.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row, ensure_ascii=False).encode())
        writer.close()
    except RuntimeError as error:
        raise OSError(errno.EIO, summarize(error), str(path)) from error
