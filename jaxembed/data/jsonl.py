"""Line files: JSONL and plain text, read at random through a memory map."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxembed.data.schema import is_text
from jaxembed.errors import UserError
from jaxembed.files import decode

JSON_WHITESPACE = b" \t\r\n"  # what JSON allows between values


class JsonLinesFile:
    """The lines of a file as bytes, without blank lines. An address is the byte offset of a line."""

    def __init__(self, path: Path):
        """Map the file into memory."""
        self.name = str(path)
        self._path = path
        try:
            with path.open("rb") as file:
                self.address_limit = os.fstat(file.fileno()).st_size
                # An empty file cannot be mapped.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.address_limit else b""
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, file:line and content of every row."""
        start = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.name}:{number}"
                if (content := self._parse_line(line, where)) is not None:
                    yield start, where, content
                start += len(line)

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        end = self._map.find(b"\n", address) + 1
        return self._parse_line(self._map[address : end or self.address_limit], self.name)

    def _parse_line(self, line: bytes, where: str) -> Any:
        """Return the content of a line, or None if it is blank."""
        return line if line.strip(JSON_WHITESPACE) else None


class TextLinesFile(JsonLinesFile):
    """The lines of a plain text file, each as a row {"text": ...}."""

    def _parse_line(self, line: bytes, where: str) -> Any:
        text = decode(line, where).strip("\r\n")
        return {"text": text} if is_text(text) else None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
