"""Convert training sources to .jsonl and .array_record files."""

from __future__ import annotations

import re
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from jaxembed.config import DataConfig, SourceConfig
from jaxembed.config.data import RowField
from jaxembed.data.array_record import write_array_record
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.sampling import iter_rows
from jaxembed.data.schema import Row
from jaxembed.data.sources import open_rows, open_sources
from jaxembed.errors import UserError
from jaxembed.files import atomic_write

UNSAFE_IN_FILE_NAME = re.compile(r"[^\w.-]")
WRITERS = {".jsonl": write_jsonl, ".array_record": write_array_record}


class CountedRows(NamedTuple):
    """The rows of a source and their number."""

    num_rows: int
    rows: Iterator[Row]


def name_files(sources: Sequence[SourceConfig], where: str) -> list[str]:
    """Return the stem of the file of each source. Raise `UserError` if two are equal."""
    names = [UNSAFE_IN_FILE_NAME.sub("_", source.display_name) for source in sources]
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{where}: several sources are named {duplicates[0]}. Give each its own name in a config.")
    return names


def convert_sources(data: DataConfig, cache: Path, outputs: Sequence[Sequence[Path]], as_pairs: bool = False) -> int:
    """Write the rows of every source, with our field names, to its output files.

    All sources are opened before anything is written. Either all files are written completely, or none is.

    Args:
        data: The sources.
        cache: Folder for the row indexes.
        outputs: Output files of each source. Its rows are split evenly among them.
        as_pairs: Write the examples as rows of pairs, regardless of the format of the source. Documents, NLI rows and BEIR
            folders are always written as pairs.

    Returns:
        The number of rows.
    """
    sources = _open_examples(data, cache) if as_pairs else [_open_unchanged(source, data, cache) for source in data.sources]
    with ExitStack() as stack:
        for paths, (count, rows) in zip(outputs, sources, strict=True):
            ends = [count * (i + 1) // len(paths) for i in range(len(paths))]
            for path, start, end in zip(paths, [0, *ends], ends, strict=False):
                shard = tqdm(islice(rows, end - start), f"writing {path}", end - start, unit="row", delay=2, leave=False)
                try:
                    partial = stack.enter_context(atomic_write(path))
                    WRITERS[path.suffix](partial, map(select_fields, shard))
                except OSError as error:
                    raise UserError(
                        f"{path}: cannot be written ({error.strerror}). Free space, or name another output."
                    ) from None
    return sum(count for count, _ in sources)


def _open_examples(data: DataConfig, cache: Path) -> list[CountedRows]:
    """Open every source as rows of pairs. They have no place for a score, so only positives of scored pairs become rows."""
    positives = tuple(source.model_copy(update={"graded": False}) for source in data.sources)
    sources = open_sources(data.model_copy(update={"sources": positives}), cache)
    return [CountedRows(sum(1 for _ in source.iter_pairs()), source.iter_pairs()) for source in sources]


def _open_unchanged(source: SourceConfig, data: DataConfig, cache: Path) -> CountedRows:
    """Open a source as rows of its own format; documents, NLI rows and BEIR folders as rows of pairs."""
    format_name, rows = open_rows(source, cache)
    if format_name == "documents":
        return _open_examples(data.model_copy(update={"sources": (source,)}), cache)[0]
    return CountedRows(len(rows), iter_rows(rows))


def select_fields(row: Row) -> dict[str, Any]:
    """Return the fields of a row that training reads."""
    return {field: row[field] for field in typing.get_args(RowField) if field in row}
