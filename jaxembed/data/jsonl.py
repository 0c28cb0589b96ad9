"""Line files: JSONL and plain text, with sequential and random access. Nothing is memory-mapped."""

from __future__ import annotations

import abc
import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxembed.data.schema import is_text
from jaxembed.errors import UserError
from jaxembed.files import decode

JSON_WHITESPACE = b" \t\r\n"  # characters that JSON allows between values
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MIN_READ_BYTES, MAX_READ_BYTES = 2**12, 2**20  # of one read; reads of a long line grow from the first to the second

ScannedRow = tuple[int, str, Any]  # address, location (for errors) and content of a row


class LineFile(abc.ABC):
    """A file of lines. An address is the byte offset of the line that starts a row.

    Rows are read by `pread`, not through a memory map: a file that is truncated meanwhile is an error, not a SIGBUS.
    """

    def __init__(self, path: Path):
        """Open the file."""
        self.name = str(path)
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.address_limit = os.fstat(self._descriptor).st_size

    @classmethod
    @abc.abstractmethod
    def scan_lines(cls, lines: Iterable[bytes], name: str) -> Iterator[ScannedRow]:
        """Yield byte offset, name:line and content of every row in some lines, which may come from a pipe."""

    def scan(self) -> Iterator[ScannedRow]:
        """Yield address, file:line and content of every row."""
        with self._path.open("rb") as file:
            yield from self.scan_lines(file, self.name)

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        return self._read_row(self._iter_lines(address))

    def locate(self, address: int) -> str:
        """Return name:line of the row at an address, for errors."""
        with self._path.open("rb") as file:
            parts = iter(lambda: file.read(min(MAX_READ_BYTES, address - file.tell())), b"")
            line = 1 + sum(part.count(b"\n") for part in parts)
        return f"{self.name}:{line}"

    def _read_row(self, lines: Iterable[bytes]) -> Any:
        """Return the content of the first row of some lines.

        Raises:
            UserError: The file is shorter than it was, or has no row there any more.
        """
        is_shorter = os.fstat(self._descriptor).st_size < self.address_limit
        row = None if is_shorter else next(self.scan_lines(lines, self.name), None)
        if row is None:
            raise UserError(f"{self.name}: changed while it was in use. Restore it, and start again.")
        return row[2]

    def _iter_lines(self, address: int) -> Iterator[bytes]:
        """Yield the lines from an address on."""
        while line := self._read_line(address):
            yield line
            address += len(line)

    def _read_line(self, address: int) -> bytes:
        """Return the line at an address, empty at the end of the file."""
        parts: list[bytes] = []
        size = MIN_READ_BYTES
        while part := os.pread(self._descriptor, size, address):
            if end := part.find(b"\n") + 1:
                return b"".join([*parts, part[:end]])
            parts.append(part)
            address, size = address + len(part), min(2 * size, MAX_READ_BYTES)
        return b"".join(parts)


class JsonLinesFile(LineFile):
    """Rows of JSON, one per line, as bytes. Blank lines are skipped."""

    @classmethod
    def scan_lines(cls, lines: Iterable[bytes], name: str) -> Iterator[ScannedRow]:
        """Yield byte offset, name:line and bytes of every line that is not blank."""
        return (located for located in _locate_lines(lines, name) if located[2].strip(JSON_WHITESPACE))


class JsonFile(JsonLinesFile):
    """A .json file that holds one row per line. A file that holds one list of rows is refused."""

    @classmethod
    def scan_lines(cls, lines: Iterable[bytes], name: str) -> Iterator[ScannedRow]:
        """Yield byte offset, name:line and bytes of every line that is not blank."""
        for address, where, line in JsonLinesFile.scan_lines(lines, name):
            if address == 0 and line.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                raise UserError(f"{name}: holds a JSON list (expected one row per line). Convert it with: jq -c '.[]'")
            yield address, where, line


class TextLinesFile(LineFile):
    """The lines of a plain text file, each as a row {"text": ...}. Blank lines are skipped."""

    @classmethod
    def scan_lines(cls, lines: Iterable[bytes], name: str) -> Iterator[ScannedRow]:
        """Yield byte offset, name:line and row of every line that is not blank."""
        for start, where, line in _locate_lines(lines, name):
            check_line_end(start, line, name)
            text = decode(line, where).strip("\r\n")
            if is_text(text):
                yield start, where, {"text": text}


def check_line_end(index: int, line: bytes, name: str) -> None:
    """Check that a file of text does not end its lines with carriage returns alone, which would make it a single text.

    Args:
        index: Number or byte offset of the line, 0 for the first one.
        line: The line, with its end.
        name: Name of the file, for the error.

    Raises:
        UserError: The file is one line with carriage returns between its texts.
    """
    if index == 0 and not line.endswith(b"\n") and b"\r" in line.rstrip(b"\r"):
        raise UserError(
            f"{name}: its lines end in carriage returns alone (expected line feeds). Convert it with: tr '\\r' '\\n' < IN > OUT"
        )


def _locate_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str, bytes]]:
    """Yield byte offset, name:line and bytes of every line."""
    start = 0
    for number, line in enumerate(lines, 1):
        yield start, f"{name}:{number}", line
        start += len(line)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
