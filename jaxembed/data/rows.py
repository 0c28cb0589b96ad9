"""Rows of one schema in any container: all are checked once, then read with random access, in constant memory.

One pass over the container checks every row and builds an index: the address of each row and one number that its schema
derives, such as a score. The index is a file in the cache. It is memory-mapped, so opening it again reads only its end:

    (address, value) per row | row indices grouped by label, if the values are labels | JSON footer | length of the footer
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxembed.data.columns import Columns, build_row, drop_nulls, list_columns, parse_content, rename_columns
from jaxembed.data.containers import Container
from jaxembed.data.schema import MISSING_FIELD, Row, RowCheck, list_fields
from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError

INDEX_VERSION = 3  # part of an index's file name; raise it when the checks, the index values or the format change
INDEX_ENTRY = np.dtype([("address", "<i8"), ("value", "<f8")])
PACKED_ENTRY, FOOTER_LENGTH = struct.Struct("<qd"), struct.Struct("<q")
ROWS_PER_BLOCK = 2**16  # rows that are processed at a time
UNFINISHED_PREFIX = "unfinished-"  # of the name of an index that is being written
MAX_UNFINISHED_AGE_S = 24 * 3600
FILE_CLOCK_TICK_NS = 50_000_000  # a file may change twice within this time without a new modification time
log = logging.getLogger(__name__)


class MissingColumnError(UserError):
    """No row has a column that `columns` of the source names."""


class RowSchema(NamedTuple):
    """The checks of a row of a format, and the value that the index stores for it.

    Attributes:
        name: Name of the format.
        check: Returns what is wrong with a row, or None.
        index_value: Returns the number that the index stores for a row, or the name of its label. None: the row is left out.
        find_drops: Returns a reason for each part of a row that is never used, or for a row that is left out.
        select: Returns the used part of an indexed row.
    """

    name: str
    check: RowCheck
    index_value: Callable[[Row], float | str | None] = lambda row: 0.0
    find_drops: Callable[[Row], Iterable[str]] = lambda row: ()
    select: Callable[[Row], Row] = lambda row: row


class IndexedRows:
    """A sequence of checked rows.

    Attributes:
        container: Where the rows are stored.
        schema: The schema that every row satisfies.
        columns: Our field -> the container's column.
        index_values: The value that the schema derives from each row, float64 [N]. Labels are indices into `label_names`.
        max_value: The largest of `index_values`.
        label_names: Sorted names of the labels, or empty.
        label_counts: The number of rows of each label.
        rows_grouped_by_label: Row indices, int64 [N]: those of the first label, then those of the second, and so on.
        row_count: The number of rows in the container, including those that the schema leaves out.
        drop_counts: Reason -> number of rows, or parts of rows, that the schema leaves out.
        digest: SHA-256 of the content. For a JSONL file without blank lines it is the SHA-256 of the file.
    """

    def __init__(self, container: Container, schema: RowSchema, cache: Path | None = None, columns: Columns | None = None):
        """Check all rows, or load the index of an earlier check.

        Args:
            container: Where the rows are stored.
            schema: The schema that every row must satisfy.
            cache: Folder of the index. Without it, or if it is not writable, the index is a temporary file.
            columns: Our field -> the container's column.

        Raises:
            UserError: Names file and line of the first bad row.
        """
        self.container, self.schema, self.columns = container, schema, columns or {}
        self._stamps = [_stamp_file(path) for path in container.files]
        entries, self.rows_grouped_by_label, footer = _load_index(self, cache)
        self._addresses, self.index_values = entries["address"], entries["value"]
        self.digest, self.max_value = str(footer["digest"]), float(footer["largest"])
        self.label_names, self.label_counts = tuple(footer["names"]), tuple(footer["counts"])
        self.row_count: int = footer["scanned"]
        self.drop_counts: dict[str, int] = footer["dropped"]

    def __len__(self) -> int:
        return len(self._addresses)

    def locate(self, index: int) -> str:
        """Return where a row is stored, for errors: file and line, or the container and the number of the row in it."""
        return self.container.locate(int(self._addresses[index]))

    def __iter__(self) -> Iterator[Row]:
        """Yield all rows in order. If the index has every row, they are read sequentially, without the index.

        Raises:
            UserError: A file changed meanwhile.
        """
        if len(self) < self.row_count:
            yield from (self[i] for i in range(len(self)))
            return
        number = 0
        try:
            for number, (_, _, content) in enumerate(self.container.scan(), 1):
                yield self.schema.select(build_row(content, f"{self.container.name} (row {number})", self.columns))
            has_changed = number != len(self) or self._stamps != [_stamp_file(path) for path in self.container.files]
        except FileNotFoundError:
            has_changed = True
        if has_changed:
            raise UserError(f"{self.container.name}: changed while it was in use. Restore it, and start again.")

    def __getitem__(self, index: int) -> Row:
        address = int(self._addresses[index])
        row = build_row(self.container.read(address), f"{self.container.name} (row {index + 1})", self.columns)
        return self.schema.select(row)


class RowsAbove:
    """Indices of the values that are at least `threshold`, in order.

    It stores one count per block of values instead of a list of indices.
    """

    def __init__(self, values: np.ndarray, threshold: float):
        """Count the values at or above the threshold in each block."""
        self._values, self._threshold = values, threshold
        starts = range(0, len(values), ROWS_PER_BLOCK)
        self._ends = np.cumsum([np.count_nonzero(values[start : start + ROWS_PER_BLOCK] >= threshold) for start in starts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> int:
        block = int(np.searchsorted(self._ends, index, side="right"))
        start, count_before = block * ROWS_PER_BLOCK, int(self._ends[block - 1]) if block else 0
        matches = np.flatnonzero(self._values[start : start + ROWS_PER_BLOCK] >= self._threshold)
        return start + int(matches[index - count_before])


def scan_with_progress(container: Container) -> Iterator[tuple[int, str, Any]]:
    """Yield address, location and content of every row, and show a progress bar if it takes long.

    Raises:
        UserError: The container cannot be read or has no rows.
    """
    is_empty = True
    try:
        for entry in progress_bar(container.scan(), desc=f"reading {container.name}", unit="row", delay=2, leave=False):
            is_empty = False
            yield entry
    except OSError as error:
        raise UserError(f"{container.name}: cannot be read ({error.strerror})") from None
    if is_empty:
        raise UserError(f"{container.name}: contains no rows")


def iter_checked_rows(
    container: Container, check: RowCheck, columns: Columns
) -> Iterator[tuple[int, Any, dict[str, Any] | UserError]]:
    """Yield address, content and row of every row, in order. A bad row is replaced by its error, which names its location.

    Raises:
        UserError: The rest cannot be read.
        MissingColumnError: No row has one of the columns.
    """
    missing_columns = {column: field for field, names in columns.items() for column in list_columns(names)}
    first_row_fields = ""
    columns_note = f" (with columns {json.dumps(dict(columns), ensure_ascii=False)})" if columns else ""
    for address, where, content in scan_with_progress(container):
        try:
            original = parse_content(content, where)
        except UserError as error:
            yield address, content, error
            continue
        first_row_fields = first_row_fields or list_fields(original)
        missing_columns = {column: field for column, field in missing_columns.items() if column not in original}
        problem = check(row := drop_nulls(rename_columns(original, columns)))
        fields_note = f". The row has {list_fields(original)}" if problem and f'" is {MISSING_FIELD} (' in problem else ""
        yield address, content, UserError(f"{where}: {problem}{fields_note}{columns_note}") if problem else row
    for column, field in missing_columns.items():
        raise MissingColumnError(
            f"{container.name}: no row has the column {column!r}, which `columns` names for {field} (the first row has "
            f"{first_row_fields})"
        )


Index = tuple[np.ndarray, np.ndarray, Mapping[str, Any]]  # entries [N], row indices grouped by label [N or 0], footer


def _load_index(rows: IndexedRows, cache: Path | None) -> Index:
    """Return the index of these rows from the cache, or build it."""
    stamps = rows._stamps
    if cache is None or not stamps:
        return _build_temporary_index(rows)
    # Read the file of this schema and these data, if it was written after the data.
    identity = [INDEX_VERSION, rows.schema.name, rows.columns, rows.container.name, *(path for path, *_ in stamps)]
    path = cache / "rows" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    if (cached := _read_cached_index(path, stamps)) is not None:
        return cached
    # Otherwise write it under another name, then rename it: other processes may write the same index.
    unfinished = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_files(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED_PREFIX, delete=False) as file:
            unfinished = file.name
            _write_index(file, rows, stamps)
        os.replace(unfinished, path)
        with path.open("rb") as file:
            return _read_index(file)
    except OSError as error:
        log.warning("%s: cannot be written (%s). The index of %s is not cached.", path, error.strerror, rows.container.name)
        return _build_temporary_index(rows)
    finally:
        if unfinished:
            Path(unfinished).unlink(missing_ok=True)


def _remove_stale_files(folder: Path) -> None:
    """Remove the unfinished indexes of killed processes: files that have not been written for a long time."""
    for path in folder.glob(f"{UNFINISHED_PREFIX}*"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - path.stat().st_mtime > MAX_UNFINISHED_AGE_S:
                path.unlink()


def _stamp_file(path: Path) -> list[Any]:
    """Return values that change with a file: its path, size, modification time, inode, and change time (ctime).

    A program can restore the first two times after an edit, but not the last.
    """
    stat = path.stat()
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


def _build_temporary_index(rows: IndexedRows) -> Index:
    """Build an index in an unnamed file, which the system removes with the process."""
    try:
        with tempfile.TemporaryFile() as file:
            _write_index(file, rows, [])
            return _read_index(file)
    except OSError as error:
        raise UserError(
            f"{rows.container.name}: the index cannot be written to {tempfile.gettempdir()} ({error.strerror}). "
            "Free some space there or in the cache."
        ) from None


def _read_cached_index(path: Path, stamps: list[Any]) -> Index | None:
    """Return the index in a file, or None if it is damaged or out of date.

    An index as young as its data files is out of date too, because they can change without a new modification time.
    """
    try:
        with path.open("rb") as file:
            index = _read_index(file)
            index_time = os.fstat(file.fileno()).st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_younger = index_time > FILE_CLOCK_TICK_NS + max(max(mtime, ctime) for _, _, mtime, _, ctime in stamps)
    return index if is_younger and index[2]["stamp"] == stamps else None


def _write_index(file: IO[bytes], rows: IndexedRows, stamps: list[Any]) -> None:
    """Read and check every row of a container, and write its index."""
    digest, largest, count, labels = hashlib.sha256(), -np.inf, 0, dict[str, int]()
    num_scanned, dropped = 0, Counter[str]()
    for address, content, row in iter_checked_rows(rows.container, rows.schema.check, rows.columns):
        if isinstance(row, UserError):
            raise row
        digest.update(content if isinstance(content, bytes) else json.dumps(drop_nulls(content), default=str).encode())
        num_scanned += 1
        dropped.update(rows.schema.find_drops(row))
        if (value := rows.schema.index_value(row)) is None:
            continue
        # Labels are numbered in order of appearance, and renumbered in sorted order at the end.
        number = labels.setdefault(value, len(labels)) if isinstance(value, str) else float(value)
        file.write(PACKED_ENTRY.pack(address, number))
        largest, count = max(largest, number), count + 1
    if not count:
        reasons = "; ".join(f"{reason}: {number:,}" for reason, number in dropped.items())
        raise UserError(f"{rows.container.name}: no row can be used ({reasons})")
    file.flush()
    names = sorted(labels)
    counts = _group_by_label(file, count, np.argsort([labels[name] for name in names])) if labels else []
    footer = {
        "rows": count,
        "stamp": stamps,
        "digest": digest.hexdigest(),
        "largest": largest,
        "names": names,
        "counts": counts,
        "scanned": num_scanned,
        "dropped": dropped,
    }
    footer_bytes = json.dumps(footer).encode()
    file.seek(0, os.SEEK_END)
    file.write(footer_bytes + FOOTER_LENGTH.pack(len(footer_bytes)))
    file.flush()


def _group_by_label(file: IO[bytes], count: int, new_labels: np.ndarray) -> list[int]:
    """Renumber the labels of an index and append its rows grouped by label.

    Args:
        file: The index, with only the entries.
        count: The number of rows.
        new_labels: The new number of each label, int [L].

    Returns:
        The number of rows of each label.
    """
    # Write the space for the groups first: in a file with holes a full disk would be a SIGBUS instead of an error.
    file.seek(0, os.SEEK_END)
    for start in range(0, count, ROWS_PER_BLOCK):
        file.write(bytes(8 * min(ROWS_PER_BLOCK, count - start)))
    file.flush()
    entries = np.memmap(file, INDEX_ENTRY, "r+", shape=(count,))
    rows_by_label = np.memmap(file, "<i8", "r+", entries.nbytes, (count,))
    blocks = [slice(start, start + ROWS_PER_BLOCK) for start in range(0, count, ROWS_PER_BLOCK)]
    counts = np.zeros(len(new_labels), np.int64)
    # First pass: renumber the labels and count their rows.
    for block in blocks:
        entries["value"][block] = new_labels[entries["value"][block].astype(np.int64)]
        counts += np.bincount(entries["value"][block].astype(np.int64), minlength=len(counts))
    # Second pass: a stable counting sort, one block of rows at a time.
    next_positions = np.cumsum(counts) - counts  # where the next row of each label goes
    for block in blocks:
        row_labels = entries["value"][block].astype(np.int64)
        order = np.argsort(row_labels, kind="stable")
        labels, first, block_counts = np.unique(row_labels[order], return_index=True, return_counts=True)
        rank_in_label = np.arange(len(order)) - np.repeat(first, block_counts)
        rows_by_label[next_positions[row_labels[order]] + rank_in_label] = block.start + order
        next_positions[labels] += block_counts
    return counts.tolist()


def _read_index(file: IO[bytes]) -> Index:
    """Map an index into memory.

    Raises:
        ValueError: It is incomplete.
    """
    footer_end = file.seek(0, os.SEEK_END) - FOOTER_LENGTH.size
    if footer_end < 0:
        raise ValueError("incomplete index")
    file.seek(footer_end)
    (footer_length,) = FOOTER_LENGTH.unpack(file.read())
    if not 0 <= footer_length <= footer_end:
        raise ValueError("incomplete index")
    file.seek(footer_end - footer_length)
    footer = json.loads(file.read(footer_length))
    count, has_labels = footer["rows"], bool(footer["names"])
    if footer_end - footer_length != count * (INDEX_ENTRY.itemsize + 8 * has_labels):
        raise ValueError("incomplete index")
    entries = np.memmap(file, INDEX_ENTRY, "r", shape=(count,))
    rows_by_label = np.memmap(file, "<i8", "r", entries.nbytes, (count,)) if has_labels else np.zeros(0, np.int64)
    # Plain arrays instead of np.memmap: their elements are read faster.
    return np.asarray(entries), np.asarray(rows_by_label), footer
