"""Containers of rows in any format. Each is scanned once, then read with random access.

A source path is one of:

- a file whose extension is in `FILE_READERS`, in any case, or that has no extension (see `find_line_reader`)
- a folder of such files (`FOLDER_EXTENSIONS`), or a glob pattern
- a folder written by `datasets.Dataset.save_to_disk`
- hf:NAME:SPLIT or tfds:NAME:SPLIT
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxembed.config.field_lists import log_once
from jaxembed.data.array_record import ArrayRecordFile
from jaxembed.data.columnar import ParquetFile
from jaxembed.data.csv_file import CsvFile, TsvFile
from jaxembed.data.file_set import FileSet
from jaxembed.data.jsonl import BYTE_ORDER_MARK, JsonFile, JsonLinesFile, LineFile, TextLinesFile
from jaxembed.data.named_datasets import (
    DATASET_SPLIT,
    TfDataset,
    is_saved_dataset,
    list_saved_splits,
    load_hub_dataset,
    load_saved_dataset,
)
from jaxembed.errors import UserError
from jaxembed.files import exists

DATASET_LOADERS: dict[str, Any] = {"hf:": load_hub_dataset, "tfds:": TfDataset}  # by prefix of the path
# By the extension of a file's name in lower case. Every command reads a file by this table.
LINE_READERS: dict[str, type[LineFile]] = {
    ".jsonl": JsonLinesFile, ".ndjson": JsonLinesFile, ".json": JsonFile, ".txt": TextLinesFile,
    ".csv": CsvFile, ".tsv": TsvFile,
}  # fmt: skip
FILE_READERS: dict[str, Any] = LINE_READERS | {".parquet": ParquetFile, ".array_record": ArrayRecordFile}
# Extensions of the files that a folder is read for. The others often hold something else beside the data.
FOLDER_EXTENSIONS = (".jsonl", ".ndjson", ".txt", ".parquet", ".array_record")
KNOWN_EXTENSIONS = ", ".join(FILE_READERS)
SHARD_NAME = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(\..+)")
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
            UserError: A file is damaged.
        """

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""

    def locate(self, address: int) -> str:
        """Return the location of the row at an address, for errors."""


def open_container(source: str) -> Container:
    """Open what the path of a source names.

    Raises:
        UserError: It does not exist, is incomplete, or has an unsupported type.
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
        if not path.is_file():
            raise UserError(f"{source}: is a pipe or a device, but rows are read more than once. Write them to a file first.")
        return FileSet(source, [path], _find_reader(path))
    if is_saved_dataset(path):
        return load_saved_dataset(path)
    if splits := list_saved_splits(path):
        raise UserError(
            f"{source}: has several splits ({', '.join(splits)}). Set split to one of them, or name its folder, such as "
            f"'{path}/{splits[0]}'."
        )
    inner_files = sorted(path.iterdir())
    data_files = [file for file in inner_files if get_extension(file) in FOLDER_EXTENSIONS]
    return _open_file_set(source, data_files or [file for file in inner_files if get_extension(file) in FILE_READERS])


def name_split(source: str, split: str) -> str:
    """Return the path of one split of a dataset that is named without it: NAME:SPLIT, or the folder of a saved split.

    Args:
        source: The path of a source.
        split: The split; empty for a path that needs none.

    Raises:
        UserError: The path has no such split, or names one already.
    """
    if not split:
        return source
    prefix = next((prefix for prefix in DATASET_LOADERS if source.startswith(prefix)), None)
    if prefix is not None:
        if match := DATASET_SPLIT.fullmatch(source.removeprefix(prefix)):
            raise UserError(f"{source}: names the split {match[2]}, but split is {split!r}. Remove one of the two.")
        return f"{source}:{split}"
    splits = list_saved_splits(Path(source))
    if not splits:
        raise UserError(
            f"{source}: split is {split!r}, but this has no splits (expected hf:NAME, tfds:NAME, a saved dataset with several "
            "splits, or a BEIR folder). Remove split."
        )
    if split not in splits:
        raise UserError(f"{source}: no split {split!r} (found {', '.join(splits)}). Set split to one of them.")
    return str(Path(source) / split)


def get_extension(path: Path) -> str:
    """Return the extension of a file's name in lower case, such as .jsonl, or an empty string."""
    return path.suffix.lower()


def find_line_reader(path: Path, lines: Iterable[bytes]) -> type[LineFile]:
    """Return the reader of a file of lines: the one of its extension, or of its content if the name has no extension.

    Without an extension, a file that starts with { or [ holds rows of JSON, any other one lines of text. The choice is logged.

    Args:
        path: The file, or a pipe.
        lines: Its lines. Only those up to the first that is not blank are taken.

    Raises:
        UserError: The extension is not one of a line file.
    """
    extension = get_extension(path)
    if extension:
        if extension not in LINE_READERS:
            raise _make_unsupported_error(path, ", ".join(LINE_READERS))
        return LINE_READERS[extension]
    first = next((line for line in lines if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
    is_json = first.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"[")
    kind = "rows of JSON" if is_json else "lines of text"
    log_once(f"{path}: has no extension; read as {kind}, because of its first character", logging.INFO)
    return JsonLinesFile if is_json else TextLinesFile


def _find_reader(path: Path) -> Any:
    """Return the reader of a regular file."""
    if extension := get_extension(path):
        if extension not in FILE_READERS:
            raise _make_unsupported_error(path, KNOWN_EXTENSIONS)
        return FILE_READERS[extension]
    try:
        with path.open("rb") as file:
            return find_line_reader(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _make_unsupported_error(path: Path, extensions: str) -> UserError:
    return UserError(f"{path}: unsupported file type {path.suffix} (expected one of {extensions})")


def is_beir_folder(path: Path) -> bool:
    """Return whether a folder is a BEIR folder, complete or not."""
    return any(exists(path / name) for name in BEIR_FILES)


def _open_file_set(source: str, files: Sequence[Path]) -> Container:
    """Open several files as one container.

    Raises:
        UserError: They have different types, belong to several sets of shards, or a shard is missing.
    """
    suffixes = sorted(set(map(get_extension, files)))
    if len(suffixes) != 1 or suffixes[0] not in FILE_READERS:
        found = f"files of several types ({', '.join(suffixes)})" if len(suffixes) > 1 else "no data files"
        raise UserError(
            f"{source}: found {found} (expected one of {KNOWN_EXTENSIONS}). "
            "Select files with a pattern, such as 'folder/*.jsonl'."
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
    return FileSet(source, files, FILE_READERS[suffixes[0]])
