"""Rows of one shape in any container: all checked once, then read from any place, with memory that does not grow with them.

What the one pass over a container learns is an index: of each row its address and one number that its shape keeps, such as a
score. It is a file in the cache, mapped into memory, so that the next opening reads nothing but its end:

    (address, number) of each row | rows by label, where the number is that of a label | JSON of the rest | its length
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxembed.data.containers import Container
from jaxembed.data.schema import MISSING, Row, RowCheck, fields_of, parse_row
from jaxembed.devices.processes import progress
from jaxembed.errors import UserError

FORMAT = 2  # part of an index's name: raise it when what is checked, kept or written changes
ENTRY = np.dtype([("address", "<i8"), ("number", "<f8")])
PACKED, LENGTH = struct.Struct("<qd"), struct.Struct("<q")
BLOCK = 2**16  # rows handled at a time
TICK = 50_000_000  # nanoseconds in which a file may change twice without a new time
LISTS = ("pos", "neg")  # fields that `columns` may take from a column of texts
log = logging.getLogger(__name__)
Columns = Mapping[Any, str]  # our field -> the container's


class RowSchema(NamedTuple):
    """What rows of a format are checked for, and what is kept of each: a number, or the text of a label."""

    name: str
    check: RowCheck
    kept: Callable[[Row], float | str] = lambda row: 0.0


class Rows:
    """A sequence of rows. `UserError` names file and line of the first bad one.

    `numbers` [N] is what the shape keeps of each row and `largest` the largest of them. Where it keeps labels, `numbers` are
    those of `names`, which are sorted; `by_label` [N] lists the rows label by label and `counts` how many each has. `digest`
    is a SHA-256 of the content: of a JSONL file without blank lines that of its bytes.
    """

    def __init__(self, container: Container, shape: RowSchema, cache: Path | None = None, columns: Columns | None = None):
        """`columns` are names of our fields -> the container's; without a `cache`, or where it cannot be written, the index
        lives as long as the rows.
        """
        self.container, self.shape, self.columns = container, shape, columns or {}
        entries, self.by_label, rest = _index(self, cache)
        self._addresses, self.numbers = entries["address"], entries["number"]
        self.digest, self.largest = str(rest["digest"]), float(rest["largest"])
        self.names, self.counts = tuple(rest["names"]), tuple(rest["counts"])

    def __len__(self) -> int:
        return len(self._addresses)

    def __getitem__(self, index: int) -> Row:
        address = int(self._addresses[index])
        return as_row(self.container.read(address), f"{self.container.name} (row {index + 1})", self.columns)


class RowsAbove:
    """The rows whose number is `least` or more, in order, found by counts of blocks, so that there is no list of them."""

    def __init__(self, numbers: np.ndarray, least: float):
        self._numbers, self._least = numbers, least
        blocks = range(0, len(numbers), BLOCK)
        self._ends = np.cumsum([np.count_nonzero(numbers[start : start + BLOCK] >= least) for start in blocks])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> int:
        block = int(np.searchsorted(self._ends, index, side="right"))
        start, before = block * BLOCK, int(self._ends[block - 1]) if block else 0
        return start + int(np.flatnonzero(self._numbers[start : start + BLOCK] >= self._least)[index - before])


def as_row(content: Any, where: str, columns: Columns) -> dict[str, Any]:
    """A row under our names of its fields."""
    return _renamed(_parsed(content, where), columns)


def _parsed(content: Any, where: str) -> dict[str, Any]:
    """A row as its container has it."""
    return parse_row(content, where) if isinstance(content, bytes) else content


def _renamed(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The row under our names: what `columns` names is taken from that column alone, and a single value makes a list where
    a list is expected.
    """
    if not columns:
        return row
    taken = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    taken |= {name: [taken[name]] for name in LISTS if name in taken and not isinstance(taken[name], list)}
    return {name: value for name, value in row.items() if name not in {*columns, *columns.values()}} | taken


def scan(container: Container) -> Iterator[tuple[int, str, Any]]:
    """Address, place and content of each row, with a bar where it takes long; `UserError` where there are none."""
    empty = True
    try:
        for found in progress(container.scan(), desc=f"reading {container.name}", unit="row", delay=2, leave=False):
            empty = False
            yield found
    except OSError as error:
        raise UserError(f"{container.name}: cannot be read ({error.strerror})") from None
    if empty:
        raise UserError(f"{container.name}: holds no rows")


def read_all(container: Container, check: RowCheck, columns: Columns) -> Iterator[tuple[int, Any, dict[str, Any] | UserError]]:
    """Address and content of each row, in order, and the row; of a bad one, the error that says where and what it is.

    `UserError` is raised where nothing more can be read, and where no row has one of the columns.
    """
    absent, first = set(columns), ""
    under = f" (under columns {json.dumps(dict(columns), ensure_ascii=False)})" if columns else ""
    for address, where, content in scan(container):
        try:
            given = _parsed(content, where)
        except UserError as error:
            yield address, content, error
            continue
        first = first or fields_of(given)
        absent = {name for name in absent if columns[name] not in given}
        problem = check(row := _renamed(given, columns))
        has = f"; the row has {fields_of(given)}" if problem and f'" is {MISSING};' in problem else ""
        yield address, content, UserError(f"{where}: {problem}{has}{under}") if problem else row
    for name in absent:
        told = f"no row has the column {columns[name]!r}, which columns names for {name}; the first row has {first}"
        raise UserError(f"{container.name}: {told}")


Index = tuple[np.ndarray, np.ndarray, Mapping[str, Any]]  # entries [N], rows by label [N or 0], the rest


def _index(rows: Rows, cache: Path | None) -> Index:
    """The index that the cache holds of these rows, else a new one."""
    stamp = [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path in rows.container.files if (stat := path.stat())]
    if cache is None or not stamp:
        return _temporary(rows)
    identity = [FORMAT, rows.shape.name, rows.columns, rows.container.name, *(path for path, _, _ in stamp)]
    path = cache / "rows" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    if (found := _kept(path, stamp)) is not None:
        return found
    partial = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="unfinished-", delete=False) as file:
            partial = file.name
            _write(file, rows, stamp)
        os.replace(partial, path)
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        log.warning("%s: cannot be written (%s): the index of %s is not kept", path, error.strerror, rows.container.name)
        return _temporary(rows)
    finally:
        Path(partial).unlink(missing_ok=True) if partial else None


def _temporary(rows: Rows) -> Index:
    """An index in a file without a name, which the system removes with the process."""
    try:
        with tempfile.TemporaryFile() as file:
            _write(file, rows, [])
            return _read(file)
    except OSError as error:
        told = f"its index cannot be written to {tempfile.gettempdir()} ({error.strerror}); make room there, or in the cache"
        raise UserError(f"{rows.container.name}: {told}") from None


def _kept(path: Path, stamp: list[Any]) -> Index | None:
    """The index in a file; None where it is damaged, is of other content, or was made while that could still change."""
    try:
        with path.open("rb") as file:
            index = _read(file)
            made = os.fstat(file.fileno()).st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fresh = made > TICK + max(modified for _, _, modified in stamp)
    return index if fresh and index[2]["stamp"] == stamp else None


def _write(file: IO[bytes], rows: Rows, stamp: list[Any]) -> None:
    """Reads and checks every row of a container, and writes its index."""
    digest, largest, count, labels = hashlib.sha256(), -np.inf, 0, dict[str, int]()
    for address, content, row in read_all(rows.container, rows.shape.check, rows.columns):
        if isinstance(row, UserError):
            raise row
        digest.update(content if isinstance(content, bytes) else json.dumps(content, default=str).encode())
        kept = rows.shape.kept(row)
        number = labels.setdefault(kept, len(labels)) if isinstance(kept, str) else float(kept)
        file.write(PACKED.pack(address, number))
        largest, count = max(largest, number), count + 1
    file.flush()
    names = sorted(labels)
    counts = _group(file, count, np.argsort([labels[name] for name in names])) if labels else []
    rest = {"rows": count, "stamp": stamp, "digest": digest.hexdigest(), "largest": largest, "names": names, "counts": counts}
    encoded = json.dumps(rest).encode()
    file.seek(0, os.SEEK_END)
    file.write(encoded + LENGTH.pack(len(encoded)))
    file.flush()


def _group(file: IO[bytes], count: int, renumbered: np.ndarray) -> list[int]:
    """Renumbers the labels of an index, appends the rows label by label, and returns how many each label has."""
    entries = np.memmap(file, ENTRY, "r+", shape=(count,))
    grouped = np.memmap(file, "<i8", "r+", entries.nbytes, (count,))
    blocks = [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]
    counts = np.zeros(len(renumbered), np.int64)
    for block in blocks:
        entries["number"][block] = renumbered[entries["number"][block].astype(np.int64)]
        counts += np.bincount(entries["number"][block].astype(np.int64), minlength=len(counts))
    free = np.cumsum(counts) - counts  # the place of each label's next row
    for block in blocks:
        numbers = entries["number"][block].astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        labels, first, of_block = np.unique(numbers[order], return_index=True, return_counts=True)
        within = np.arange(len(order)) - np.repeat(first, of_block)
        grouped[free[numbers[order]] + within] = block.start + order
        free[labels] += of_block
    return counts.tolist()


def _read(file: IO[bytes]) -> Index:
    """Maps an index; `ValueError` where it is not whole."""
    end = file.seek(0, os.SEEK_END) - LENGTH.size
    if end < 0:
        raise ValueError("no index")
    file.seek(end)
    (length,) = LENGTH.unpack(file.read())
    if not 0 <= length <= end:
        raise ValueError("no index")
    file.seek(end - length)
    rest = json.loads(file.read(length))
    count, labelled = rest["rows"], bool(rest["names"])
    if end - length != count * (ENTRY.itemsize + 8 * labelled):
        raise ValueError("no index")
    entries = np.memmap(file, ENTRY, "r", shape=(count,))
    by_label = np.memmap(file, "<i8", "r", entries.nbytes, (count,)) if labelled else np.zeros(0, np.int64)
    return np.asarray(entries), np.asarray(by_label), rest  # plain views, whose elements are read faster
