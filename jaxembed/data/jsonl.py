"""Random access to a JSONL file of any size: a memory map and the offsets of its lines."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.data.schema import RowCheck, parse_row
from jaxembed.errors import UserError

BLANK = b" \t\r\n"  # what JSON takes between values


class JsonLines:
    """A sequence of rows. Every line is checked once, on opening; `UserError` names file and line.

    `digest` is the SHA-256 of the file's bytes.
    """

    def __init__(self, path: Path | str, check: RowCheck):
        self.path = Path(path)
        offsets, digest = [], hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip(BLANK):
                        where = f"{self.path}:{number}"
                        if problem := check(parse_row(line, where)):
                            raise UserError(f"{where}: {problem}")
                        offsets.append(start)
                    start += len(line)
                self._end = start
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else None
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not offsets:
            raise UserError(f"{self.path}: the file holds no rows; expected one JSON object a line")
        self._offsets = np.array(offsets, np.int64)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self._map is not None
        start = int(self._offsets[index])
        end = int(self._offsets[index + 1]) if index + 1 < len(self) else self._end
        return parse_row(self._map[start:end], f"{self.path} (row {index + 1})")


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a file, by which its format is recognised."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(BLANK):
                    return parse_row(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    raise UserError(f"{path}: the file holds no rows; expected one JSON object a line")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON, one a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
