"""Sources and rows of files, for the tests of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxembed.config import SourceConfig
from jaxembed.data.containers import open_container
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sources import ROW_SCHEMAS, Source, open_source

PAIRS: list[dict[str, Any]] = [{"query": f"é {i}", "pos": [f"p {i}", "数学"], "neg": [f"n {i}"]} for i in range(25)]


def open_rows(path: Path | str, cache: Path | None = None, schema: str = "pairs", **columns: str) -> IndexedRows:
    return IndexedRows(open_container(str(path)), ROW_SCHEMAS[schema], cache, columns)


def open_source_path(path: Path | str, cache: Path, **options: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **options), cache)
