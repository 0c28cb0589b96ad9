"""Read the texts to encode from a file or pipe of any format, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from jaxembed.config.field_lists import log_once
from jaxembed.data.columns import parse_content
from jaxembed.data.containers import FILE_READERS, LINE_READERS, find_line_reader, get_extension, open_container
from jaxembed.data.jsonl import TextLinesFile, check_line_end
from jaxembed.data.rows import IndexedRows, RowSchema
from jaxembed.data.sampling import iter_rows
from jaxembed.data.schema import check_few_shot_example
from jaxembed.data.tokenize import MAX_TEXT_CHARS
from jaxembed.errors import UserError
from jaxembed.files import decode, exists

TEXTS_PER_BATCH, CHARS_PER_BATCH = 4096, 2**22  # a batch ends at whichever comes first


def is_pipe(source: str) -> bool:
    """Return whether an input is a pipe or a device, such as /dev/stdin, which can be read only once."""
    path = Path(source)
    return exists(path) and not path.is_file() and not path.is_dir()


def group_texts(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield the texts in batches. A batch ends at `TEXTS_PER_BATCH` texts or `CHARS_PER_BATCH` characters."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) == TEXTS_PER_BATCH or chars >= CHARS_PER_BATCH:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def read_few_shot_examples(path: Path) -> list[tuple[str, str]]:
    """Read the (query, response) pair of each row of a JSONL file.

    Raises:
        UserError: A row is malformed. The error names file and line.
    """
    rows = IndexedRows(open_container(str(path)), RowSchema("few_shot_examples", check_few_shot_example))
    return [(row["query"], row["response"]) for row in iter_rows(rows)]


def read_texts(source: str, field: str) -> Iterator[str]:
    """Yield the texts of an input: the lines of a text file, or one field of each row of any other.

    The extension of a file determines how it is read, as in training (`data.containers`). Blank lines of a text file are
    texts too, so that lines and vectors correspond; those at its end are skipped. Texts are truncated to `MAX_TEXT_CHARS`.

    Raises:
        UserError: A line is malformed. The error names file and line.
    """
    truncated_count = 0
    for text in _read_whole_texts(source, field):
        truncated_count += len(text) > MAX_TEXT_CHARS
        yield text[:MAX_TEXT_CHARS]
    if truncated_count:
        log_once(f"{source}: {truncated_count:,} texts have more than {MAX_TEXT_CHARS:,} characters and are truncated")


def _read_whole_texts(source: str, field: str) -> Iterator[str]:
    """Yield the texts of an input, not truncated."""
    path = Path(source)
    if not exists(path) or path.is_dir() or get_extension(path) in FILE_READERS.keys() - LINE_READERS.keys():
        yield from _read_field(open_container(source).scan(), field)
        return
    try:
        with path.open("rb") as file:
            first_lines: list[bytes] = []  # the lines that `find_line_reader` consumes; a pipe cannot be rewound
            reader = find_line_reader(path, _record(file, first_lines))
            lines = chain(first_lines, file)
            yield from (
                _read_lines(lines, source) if reader is TextLinesFile else _read_field(reader.scan_lines(lines, source), field)
            )
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None


def _record(lines: Iterable[bytes], recorded_lines: list[bytes]) -> Iterator[bytes]:
    """Yield lines, and append each one to a list."""
    for line in lines:
        recorded_lines.append(line)
        yield line


def _read_lines(lines: Iterable[bytes], source: str) -> Iterator[str]:
    """Yield the lines of a text file without the blank ones at its end."""
    blank: list[str] = []  # blank lines since the last text
    for number, line in enumerate(lines, 1):
        check_line_end(number - 1, line, source)
        text = decode(line, f"{source}:{number}").rstrip("\r\n")
        if not text.strip():
            blank.append(text)
            continue
        yield from blank
        blank = []
        yield text


def _read_field(rows: Iterable[tuple[int, str, Any]], field: str) -> Iterator[str]:
    """Yield one field of every row."""
    for _, where, content in rows:
        text = parse_content(content, where).get(field)
        if not isinstance(text, str):
            raise UserError(f'{where}: no string field "{field}". Name the field to encode with --field.')
        yield text
