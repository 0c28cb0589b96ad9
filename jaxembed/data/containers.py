"""Containers: where rows lie, whatever their shape. Each is read from beginning to end once, then from any place.

FILE | FOLDER | GLOB of .jsonl .txt .parquet .array_record files | folder of a saved dataset | hf:NAME:SPLIT | tfds:NAME:SPLIT
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
from jaxembed.data.jsonl import JsonLines, TextLines
from jaxembed.errors import UserError
from jaxembed.files import exists

NAMED: dict[str, Any] = {"hf:": load_hub_dataset, "tfds:": TfDataset}
SHARDS: dict[str, Any] = {
    ".jsonl": JsonLines, ".txt": TextLines, ".parquet": ParquetFile, ".array_record": ArrayRecordFile,
}  # fmt: skip
FILES = SHARDS | {
    ".json": JsonLines,
    ".ndjson": JsonLines,
    "": JsonLines,
}  # of a file that is named itself
SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(\..+)")
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in the folder of a dataset, and of several splits
BEIR = ("corpus.jsonl", "queries.jsonl")


class Container(Protocol):
    """Rows by addresses below `extent`, and the files that they lie in. Content is a row, or a row's JSON in bytes."""

    name: str
    extent: int

    @property
    def files(self) -> Sequence[Path]: ...

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Address, place (for errors) and content of each row, in order. `UserError` where a file is damaged."""

    def read(self, address: int) -> Any:
        """The content of the row there."""


class Files:
    """Files of one kind as one container: their addresses follow one another."""

    def __init__(self, name: str, files: Sequence[Path], kind: Any):
        self.name, self.files = name, files
        self._parts = [kind(path) for path in files]
        self._ends = list(accumulate(part.extent for part in self._parts))
        self.extent = self._ends[-1]
        for part in self._parts if kind is ParquetFile else ():
            if set(part.columns) != set(self._parts[0].columns):
                found, first = (", ".join(sorted(p.columns)) for p in (part, self._parts[0]))
                raise UserError(f"{part.name}: its columns are {found}; those of {self._parts[0].name} are {first}")

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        for part, end in zip(self._parts, self._ends, strict=True):
            for address, where, content in part.scan():
                yield end - part.extent + address, where, content

    def read(self, address: int) -> Any:
        number = bisect_right(self._ends, address)
        part = self._parts[number]
        return part.read(address - self._ends[number] + part.extent)


def open_container(source: str) -> Container:
    """Opens what the path of a source names; `UserError` where it is not there, not whole, or of no known kind."""
    for prefix, open_named in NAMED.items():
        if source.startswith(prefix):
            return open_named(source.removeprefix(prefix))
    path = Path(source)
    if not exists(path):
        found = [Path(name) for name in sorted(glob.glob(source))]
        if not found:
            raise UserError(f"{source}: no such file or folder")
        return _of_one_kind(source, found)
    if not path.is_dir():
        if path.suffix not in FILES:
            raise UserError(f"{source}: files of {path.suffix} are not read; expected one of {', '.join(SHARDS)}")
        return Files(source, [path], FILES[path.suffix])
    if exists(path / SAVED[0]):
        return load_saved_dataset(path)
    if exists(path / SAVED[1]):
        raise UserError(f"{source}: the folder holds a dataset of several splits; name the folder of one, such as {path}/train")
    return _of_one_kind(source, sorted(inner for inner in path.iterdir() if inner.suffix in SHARDS))


def is_beir(path: Path) -> bool:
    """Whether a folder is a BEIR folder, whole or not."""
    return any(exists(path / name) for name in BEIR)


def _of_one_kind(source: str, files: Sequence[Path]) -> Container:
    """Several files as one container; `UserError` unless they are of one kind, and all shards of one set."""
    suffixes = sorted({path.suffix for path in files})
    if len(suffixes) != 1 or suffixes[0] not in SHARDS:
        found = f"files of several kinds ({', '.join(suffixes)})" if len(suffixes) > 1 else "no files of rows"
        raise UserError(
            f"{source}: found {found}; expected one of {', '.join(SHARDS)}; a pattern names some, as folder/*.jsonl"
        )
    sets: dict[tuple[str, int, str], list[int]] = {}
    for shard in filter(None, (SHARD.fullmatch(path.name) for path in files)):
        sets.setdefault((shard[1], int(shard[3]), shard[4]), []).append(int(shard[2]))
    if len(sets) > 1:
        told = ", ".join(f"{name}-*{suffix}" for name, _, suffix in sets)
        raise UserError(f"{source}: found the shards of several sets ({told}); name one of them")
    for (name, count, suffix), numbers in sets.items():
        if missing := sorted(set(range(count)) - set(numbers)):
            raise UserError(f"{source}: the shard {name}-{missing[0]:05d}-of-{count:05d}{suffix} is missing")
    return Files(source, files, SHARDS[suffixes[0]])
