"""Files of lines: JSONL and plain text, read from any place through a memory map."""

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

BLANK = b" \t\r\n"  # what JSON takes between values


class JsonLines:
    """The lines of a file that are not blank, as they are; an address is the offset of a line."""

    def __init__(self, path: Path):
        self.name = str(path)
        self._path = path
        try:
            with path.open("rb") as file:
                self.extent = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.extent else b""
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Address, file:line and content of each row."""
        start = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.name}:{number}"
                if (content := self._content(line, where)) is not None:
                    yield start, where, content
                start += len(line)

    def read(self, address: int) -> Any:
        """The content of the row there."""
        end = self._map.find(b"\n", address) + 1
        return self._content(self._map[address : end or self.extent], self.name)

    def _content(self, line: bytes, where: str) -> Any:
        """The row of a line, None of a blank one."""
        return line if line.strip(BLANK) else None


class TextLines(JsonLines):
    """The lines of a plain text, each a row {"text": ...}."""

    def _content(self, line: bytes, where: str) -> Any:
        text = decode(line, where).strip("\r\n")
        return {"text": text} if is_text(text) else None


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON, one a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
