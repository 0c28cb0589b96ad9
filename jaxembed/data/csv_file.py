"""CSV and TSV files with a header, with sequential and random access."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from jaxembed.data.jsonl import LineFile, ScannedRow
from jaxembed.errors import UserError
from jaxembed.files import decode

csv.field_size_limit(2**31 - 1)  # Python's default refuses texts of more than 131,072 characters


class TextCells(dict[str, Any]):
    """A row of a CSV file: all values are strings, and None where a cell is empty."""


class _CountedLines:
    """Decodes lines, and counts the lines and bytes that a CSV reader has taken: a quoted cell may span several lines."""

    def __init__(self, lines: Iterable[bytes], name: str):
        self._lines, self._name = lines, name
        self.lines = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.lines += 1
            self.bytes += len(line)
            yield decode(line, f"{self._name}:{self.lines}")


class CsvFile(LineFile):
    """A CSV file (RFC 4180). The first line that is not blank names the columns."""

    delimiter = ","

    def __init__(self, path: Path):
        """Open the file."""
        super().__init__(path)
        self._header_lines: list[bytes] = []

    @classmethod
    def scan_lines(cls, lines: Iterable[bytes], name: str) -> Iterator[ScannedRow]:
        """Yield byte offset, name:line and row of every record after the header."""
        counted_lines = _CountedLines(lines, name)
        reader = csv.reader(counted_lines, delimiter=cls.delimiter, strict=True)
        header: list[str] = []
        while True:
            start, where = counted_lines.bytes, f"{name}:{counted_lines.lines + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{where}: not valid CSV ({error}). Quote cells that hold quotes or line breaks.") from None
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _check_header(cells, where)
                continue
            if len(cells) != len(header):
                raise UserError(f"{where}: has {len(cells)} cells (expected {len(header)}, as the header: {', '.join(header)})")
            yield start, where, TextCells(zip(header, (cell or None for cell in cells), strict=True))

    def read(self, address: int) -> Any:
        """Return the row at an address."""
        if not self._header_lines:
            self._header_lines = list(islice(self._iter_lines(0), self._count_header_lines()))
        return self._read_row(chain(self._header_lines, self._iter_lines(address)))

    def _count_header_lines(self) -> int:
        """Return the number of lines up to the end of the header."""
        counted_lines = _CountedLines(self._iter_lines(0), self.name)
        for cells in csv.reader(counted_lines, delimiter=self.delimiter, strict=True):
            if any(cell.strip() for cell in cells):
                break
        return counted_lines.lines


class TsvFile(CsvFile):
    """A TSV file: cells separated by tabs, quoted as in CSV."""

    delimiter = "\t"


def _check_header(cells: list[str], where: str) -> list[str]:
    """Return the names of the columns, or raise `UserError` if two are equal."""
    if repeated_names := [cell for i, cell in enumerate(cells) if cell in cells[:i]]:
        raise UserError(f"{where}: two columns are named {repeated_names[0]!r}. Rename one.")
    return cells
