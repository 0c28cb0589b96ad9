"""Several files as one container of rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxembed.data.table_file import TableFile
from jaxembed.errors import UserError


class FileSet:
    """Several files of one type as one container. The addresses of a file continue those of the previous file."""

    def __init__(self, name: str, files: Sequence[Path], reader: Callable[[Path], Any]):
        """Open all files with `reader`, the class of their type."""
        self.name, self.files = name, files
        self._parts = [reader(path) for path in files]
        self._ends = list(accumulate(part.address_limit for part in self._parts))
        self.address_limit = self._ends[-1]
        for part in self._parts:
            if isinstance(part, TableFile) and set(part.columns) != set(self._parts[0].columns):
                found, expected = (", ".join(sorted(p.columns)) for p in (part, self._parts[0]))
                raise UserError(f"{part.name}: the columns are {found} (expected those of {self._parts[0].name}: {expected})")

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, location and content of every row."""
        for part, end in zip(self._parts, self._ends, strict=True):
            for address, where, content in part.scan():
                yield end - part.address_limit + address, where, content

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        part, part_address = self._find_part(address)
        return part.read(part_address)

    def locate(self, address: int) -> str:
        """Return where the row at an address is stored, for errors: file and line if the files have lines."""
        part, part_address = self._find_part(address)
        return str(part.locate(part_address))

    def _find_part(self, address: int) -> tuple[Any, int]:
        """Return the file of a row, and the address of the row there."""
        index = bisect_right(self._ends, address)
        part = self._parts[index]
        return part, address - self._ends[index] + part.address_limit
