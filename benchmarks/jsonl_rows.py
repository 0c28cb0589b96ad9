"""Read the rows of JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the JSON object on each line of a file."""
    with path.open(encoding="utf-8") as file:  # its lines end at line feeds only, not at other separators inside a text
        return [json.loads(line) for line in file]


def list_texts(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the distinct texts of rows with query and pos, in their order."""
    return list(dict.fromkeys(text for row in rows for text in (row["query"], *row["pos"])))
