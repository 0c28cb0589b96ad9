"""The sources of a curation, opened as rows of pairs, scored pairs, labels, or texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxembed.config import SourceConfig
from jaxembed.curation.steps.curated_row import SINGLE_FIELDS, CuratedRow
from jaxembed.data.convert import name_files
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sampling import iter_rows
from jaxembed.data.schema import Row
from jaxembed.data.sources import open_rows, open_source

# Keys of a source that decide which rows a curation reads from the same content.
ROW_KEYS = ("columns", "split", "label_scores", "score_range", "pair_templates", "equality", "where", "min_chars", "max_chars")
PAIR_BUILDING_FORMATS = ("documents", "chat")  # formats whose rows a sampler turns into pairs


class CuratedSource(NamedTuple):
    """An open source.

    Attributes:
        name: Name in the report and of the output file.
        path: Path in the config.
        format: Format of the rows that go through the steps. Documents, chats, NLI and BEIR data become pairs.
        digest: SHA-256 of the content.
        keys: Values of `ROW_KEYS`, as JSON.
        num_rows: Number of rows. For documents: the number of documents, each of which yields a row per template.
        iter_rows: Returns an iterator over the rows.
        locate: Returns where the row with a given number is stored, for errors.
    """

    name: str
    path: str
    format: str
    digest: str
    keys: str
    num_rows: int
    iter_rows: Callable[[], Iterator[Row]]
    locate: Callable[[int], str]


def open_curated_sources(configs: Sequence[SourceConfig], cache: Path, where: str) -> list[CuratedSource]:
    """Open and check all sources. Raise `UserError` for the first bad row, or for equal names."""
    names = name_files(configs, where)
    return [_open_source(config, name, cache) for config, name in zip(configs, names, strict=True)]


def _open_source(config: SourceConfig, name: str, cache: Path) -> CuratedSource:
    def locate(number: int) -> str:
        """Return the file and line of a row. For pairs that are built from several rows or templates: the pair's number."""
        if isinstance(rows, IndexedRows) and format_name not in PAIR_BUILDING_FORMATS:
            return rows.locate(number - 1)
        return f"{config.path}: pair {number}"

    keys = config.model_dump_json(include={*ROW_KEYS})
    format_name, rows = open_rows(config, cache)
    if format_name in PAIR_BUILDING_FORMATS:
        source = open_source(config.model_copy(update={"max_examples": None}), cache)
        return CuratedSource(name, config.path, "pairs", source.digest, keys, len(source), source.iter_pairs, locate)
    curated_format = format_name if format_name in SINGLE_FIELDS else "pairs"
    return CuratedSource(name, config.path, curated_format, rows.digest, keys, len(rows), lambda: iter_rows(rows), locate)


def iter_curated_rows(sources: Sequence[CuratedSource]) -> Iterator[CuratedRow]:
    """Yield the rows of all sources, one source after the other."""
    for i, source in enumerate(sources):
        for number, row in enumerate(source.iter_rows(), 1):
            yield CuratedRow(i, number, source.format, row)
