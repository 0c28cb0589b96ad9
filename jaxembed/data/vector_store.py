"""Vectors on disk by key: what was computed once is read back, bit for bit, by every later run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxembed.errors import UserError

KEY = 16  # bytes
NUMBER = struct.Struct("<I")


class VectorStore:
    """float32 vectors of one width by keys of 16 bytes, in a folder that threads and processes may share.

    `vectors` holds row after row, `index` a frame for each addition: the count of its keys, the keys, and a CRC-32 of both.
    A frame is written after its vectors are on the disk, so a kill leaves an addition whole or not at all; what is left of
    a torn one is overwritten by the next. The first vector of a key stays, whoever else computes it.
    """

    def __init__(self, folder: Path, width: int):
        """`UserError` where the folder cannot be written."""
        self._folder, self._width = folder, width
        self._keys, self._rows = np.zeros(0, f"S{KEY}"), np.zeros(0, np.int64)  # by key
        self._read = 0  # bytes of the index
        self._one = threading.Lock()
        with self._alone():
            for name in ("vectors", "index"):
                (folder / name).touch()
            self._refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def fetch(self, keys: Sequence[bytes], make: Callable[[list[int]], np.ndarray]) -> np.ndarray:
        """The vectors [N, width] of `keys`. `make` computes those that are not there, given their places in `keys`, each
        key once, in order.
        """
        if not keys:
            return np.zeros((0, self._width), np.float32)
        with self._one:
            rows = self._find(keys)
            places = {key: i for i, (key, row) in reversed(list(enumerate(zip(keys, rows, strict=True)))) if row < 0}
            if missing := sorted(places.values()):
                self._add([keys[i] for i in missing], make(missing))
                rows = self._find(keys)
            return np.array(np.memmap(self._folder / "vectors", np.float32, "r", shape=(len(self), self._width))[rows])

    def _find(self, keys: Sequence[bytes]) -> np.ndarray:
        """The row of each key, -1 for none."""
        wanted = np.array(keys, self._keys.dtype)
        places = np.searchsorted(self._keys, wanted)
        rows = np.full(len(keys), -1)
        inside = np.flatnonzero(places < len(self))
        found = inside[self._keys[places[inside]] == wanted[inside]]
        rows[found] = self._rows[places[found]]
        return rows

    def _add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        with self._alone():
            self._refresh()
            new = [i for i, row in enumerate(self._find(keys)) if row < 0]  # others may have added some meanwhile
            if not new:
                return
            os.truncate(self._folder / "index", self._read)  # first: no torn frame may come to hold these vectors
            self._append("vectors", len(self) * 4 * self._width, np.asarray(vectors[new], np.float32).tobytes())
            frame = NUMBER.pack(len(new)) + b"".join(keys[i] for i in new)
            self._append("index", self._read, frame + NUMBER.pack(zlib.crc32(frame)))
            self._refresh()

    def _append(self, name: str, end: int, content: bytes) -> None:
        with (self._folder / name).open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _refresh(self) -> None:
        """Takes up what was added since; a torn frame, or one without all of its vectors, ends the index."""
        room = (self._folder / "vectors").stat().st_size // (4 * self._width) - len(self)
        with (self._folder / "index").open("rb") as file:
            file.seek(self._read)
            content = file.read()
        added, read = [], 0
        while frame := _frame(content, read):
            keys = np.frombuffer(frame, self._keys.dtype, offset=NUMBER.size)
            room -= len(keys)
            if room < 0:
                break
            added.append(keys)
            read += len(frame) + NUMBER.size
        self._read += read
        if added:
            keys = np.concatenate(added)
            order = np.argsort(keys)
            places = np.searchsorted(self._keys, keys[order])
            self._rows = np.insert(self._rows, places, len(self) + order)
            self._keys = np.insert(self._keys, places, keys[order])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process reads the index or adds."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            told = f"vectors cannot be kept there ({error.strerror}); mend it, or name another place with JAXEMBED_CACHE"
            raise UserError(f"{self._folder}: {told}") from error


def key_of(first: str, second: str) -> bytes:
    """The key of two texts: of a query and a document, or of what leads a text and the text."""
    return hashlib.sha256(f"{len(first)} {first}{second}".encode("utf-8", "surrogatepass")).digest()[:KEY]


def _frame(content: bytes, start: int) -> bytes:
    """The count and keys of the frame that begins there; empty where it is not whole."""
    if len(content) < start + NUMBER.size:
        return b""
    end = start + NUMBER.size + KEY * NUMBER.unpack_from(content, start)[0]
    if len(content) < end + NUMBER.size:
        return b""
    frame = content[start:end]
    return frame if NUMBER.unpack_from(content, end)[0] == zlib.crc32(frame) else b""
