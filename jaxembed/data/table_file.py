"""The common base of Parquet and Arrow files: tables whose rows are decoded group by group."""

from __future__ import annotations

import abc
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError, summarize

MAX_DECODED_BYTES = 256 * 2**20  # of decoded groups of rows that stay in memory, per file
ROWS_PER_READ = 1024  # of a scan


class TableFile(abc.ABC):
    """A file of groups of rows. An address is the number of a row, from 0.

    Reading one row decodes its whole group. The most recently used groups stay in memory, up to `MAX_DECODED_BYTES`. Nothing is
    mapped into memory: a file that is truncated while it is read is an error, not a SIGBUS.

    Attributes:
        name: Path of the file.
        columns: Names of the columns.
        address_limit: Number of rows.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], group_sizes: Sequence[int], read_errors: tuple[type[Exception], ...]
    ):
        """Start without decoded groups.

        Args:
            path: The file.
            columns: Names of the columns.
            group_sizes: Number of rows of each group.
            read_errors: What reading raises if the file is damaged.
        """
        self.name, self.columns = str(path), list(columns)
        self._group_ends, self._read_errors = list(accumulate(group_sizes)), read_errors
        self.address_limit = sum(group_sizes)
        self._lock, self._decoded_groups = threading.Lock(), OrderedDict[int, Any]()

    @abc.abstractmethod
    def _read_group(self, group: int) -> Any:
        """Return a group of rows as a table of pyarrow."""

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, file and row number, and content of every row."""
        address = 0
        try:
            for table in self._iter_tables():
                for row in table.to_pylist():
                    yield address, f"{self.name}: row {address + 1}", row
                    address += 1
        except self._read_errors as error:
            raise self._make_damage_error(address, error) from None

    def _iter_tables(self) -> Iterator[Any]:
        """Yield the rows in order, in tables of at most `ROWS_PER_READ`."""
        for group in range(len(self._group_ends)):
            with self._lock:
                table = self._read_group(group)
            yield from (table.slice(start, ROWS_PER_READ) for start in range(0, len(table), ROWS_PER_READ))

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        group = bisect_right(self._group_ends, address)
        start = self._group_ends[group - 1] if group else 0
        try:
            with self._lock:
                row = self._decode_group(group).slice(address - start, 1)
            return row.to_pylist()[0]
        except self._read_errors as error:
            raise self._make_damage_error(address, error) from None

    def locate(self, address: int) -> str:
        """Return file and row number of the row at an address, for errors."""
        return f"{self.name}: row {address + 1}"

    def _decode_group(self, group: int) -> Any:
        """Return a decoded group, and drop the least recently used ones beyond `MAX_DECODED_BYTES`."""
        decoded = self._decoded_groups
        if group not in decoded:
            decoded[group] = self._read_group(group)
            while len(decoded) > 1 and sum(table.nbytes for table in decoded.values()) > MAX_DECODED_BYTES:
                decoded.popitem(last=False)
        decoded.move_to_end(group)
        return decoded[group]

    def _make_damage_error(self, address: int, error: Exception) -> UserError:
        return UserError(f"{self.name}: row {address + 1} or a later row is damaged ({summarize(error)})")
