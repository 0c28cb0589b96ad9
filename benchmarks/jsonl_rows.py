"""Read the rows of JSONL files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the JSON object on each line of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
