"""Containers: where rows are stored, whatever they mean. Each is scanned once, then read at random.

A source path is one of:

- a .jsonl, .txt, .parquet or .array_record file, a folder of such files, or a glob pattern
- a folder written by `datasets.Dataset.save_to_disk`
- hf:NAME:SPLIT or tfds:NAME:SPLIT
"""

from __future__ import annotations

import glob
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from jaxembed.data.array_record import ArrayRecordFile
from jaxembed.data.columnar import ParquetFile, TfDataset, load_hub_dataset, load_saved_dataset
from jaxembed.data.jsonl import JsonLinesFile, TextLinesFile
from jaxembed.errors import UserError
from jaxembed.files import exists

DATASET_LOADERS: dict[str, Any] = {"hf:": load_hub_dataset, "tfds:": TfDataset}  # by prefix of the path
SHARD_READERS: dict[str, Any] = {  # by suffix, for files found in a folder or by a pattern
    ".jsonl": JsonLinesFile, ".txt": TextLinesFile, ".parquet": ParquetFile, ".array_record": ArrayRecordFile,
}  # fmt: skip
FILE_READERS = SHARD_READERS | {  # for a file that the path names itself
    ".json": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    "": JsonLinesFile,
}
SHARD_NAME = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(\..+)")
SAVED_DATASET_FILE = "state.json"  # written by `Dataset.save_to_disk`
SAVED_SPLITS_FILE = "dataset_dict.json"  # written by `DatasetDict.save_to_disk`
BEIR_FILES = ("corpus.jsonl", "queries.jsonl")


class Container(Protocol):
    """Rows at integer addresses below `address_limit`. The content at an address is a row, or its JSON as bytes."""

    name: str
    address_limit: int

    @property
    def files(self) -> Sequence[Path]:
        """Return the files that hold the rows."""

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, location (for errors) and content of every row, in order.

        Raises:
            UserError: If a file is damaged.
        """

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""


class FileSet:
    """Several files of one type as one container. The addresses of a file follow those of the file before it."""

    def __init__(self, name: str, files: Sequence[Path], reader: Any):
        """Open all files with `reader`, one of `FILE_READERS`."""
        self.name, self.files = name, files
        self._parts = [reader(path) for path in files]
        self._ends = list(accumulate(part.address_limit for part in self._parts))
        self.address_limit = self._ends[-1]
        for part in self._parts if reader is ParquetFile else ():
            if set(part.columns) != set(self._parts[0].columns):
                found, expected = (", ".join(sorted(p.columns)) for p in (part, self._parts[0]))
                raise UserError(f"{part.name}: the columns are {found}; expected those of {self._parts[0].name}: {expected}")

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, location and content of every row."""
        for part, end in zip(self._parts, self._ends, strict=True):
            for address, where, content in part.scan():
                yield end - part.address_limit + address, where, content

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        index = bisect_right(self._ends, address)
        part = self._parts[index]
        return part.read(address - self._ends[index] + part.address_limit)


def open_container(source: str) -> Container:
    """Open what the path of a source names.

    Raises:
        UserError: If it does not exist, is incomplete, or has an unsupported type.
    """
    for prefix, load_dataset in DATASET_LOADERS.items():
        if source.startswith(prefix):
            return load_dataset(source.removeprefix(prefix))
    path = Path(source)
    if not exists(path):
        matches = [Path(name) for name in sorted(glob.glob(source))]
        if not matches:
            raise UserError(f"{source}: no such file or folder")
        return _open_file_set(source, matches)
    if not path.is_dir():
        if path.suffix not in FILE_READERS:
            raise UserError(f"{source}: unsupported file type {path.suffix}; expected one of {', '.join(SHARD_READERS)}")
        return FileSet(source, [path], FILE_READERS[path.suffix])
    if exists(path / SAVED_DATASET_FILE):
        return load_saved_dataset(path)
    if exists(path / SAVED_SPLITS_FILE):
        raise UserError(f"{source}: the folder has several splits. Name the folder of one split, such as '{path}/train'.")
    return _open_file_set(source, sorted(inner for inner in path.iterdir() if inner.suffix in SHARD_READERS))


def is_beir_folder(path: Path) -> bool:
    """Return whether a folder is a BEIR folder, complete or not."""
    return any(exists(path / name) for name in BEIR_FILES)


def _open_file_set(source: str, files: Sequence[Path]) -> Container:
    """Open several files as one container.

    Raises:
        UserError: If they have different types, belong to several sets of shards, or a shard is missing.
    """
    suffixes = sorted({path.suffix for path in files})
    if len(suffixes) != 1 or suffixes[0] not in SHARD_READERS:
        found = f"files of several types ({', '.join(suffixes)})" if len(suffixes) > 1 else "no data files"
        raise UserError(
            f"{source}: found {found}; expected one of {', '.join(SHARD_READERS)}. Select files with a pattern, such as "
            "'folder/*.jsonl'."
        )
    shard_sets: dict[tuple[str, int, str], list[int]] = {}
    for match in filter(None, (SHARD_NAME.fullmatch(path.name) for path in files)):
        shard_sets.setdefault((match[1], int(match[3]), match[4]), []).append(int(match[2]))
    if len(shard_sets) > 1:
        found = ", ".join(f"{name}-*{suffix}" for name, _, suffix in shard_sets)
        raise UserError(f"{source}: found several sets of shards ({found}). Name one of them.")
    for (name, count, suffix), numbers in shard_sets.items():
        if missing := sorted(set(range(count)) - set(numbers)):
            raise UserError(f"{source}: shard {name}-{missing[0]:05d}-of-{count:05d}{suffix} is missing")
    return FileSet(source, files, SHARD_READERS[suffixes[0]])
