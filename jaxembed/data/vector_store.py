"""Store vectors on disk by key, so that later runs read back, bit for bit, what was computed once."""

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

KEY_BYTES = 16
UINT32 = struct.Struct("<I")


class VectorStore:
    """float32 vectors of one width by keys of 16 bytes, in a folder that threads and processes may share.

    The file `vectors` holds one row after another. The file `index` holds one frame per addition: the number of its keys, the
    keys, and a CRC-32 of both. A frame is written after its vectors are on disk, so a kill leaves an addition complete or
    absent. The remains of an incomplete addition are overwritten by the next one. The first vector stored for a key stays.
    """

    def __init__(self, folder: Path, width: int):
        """Open or create a store.

        Args:
            folder: Folder of the store.
            width: Width of the vectors.

        Raises:
            UserError: If the folder cannot be written.
        """
        self._folder, self._width = folder, width
        self._keys, self._rows = np.zeros(0, f"S{KEY_BYTES}"), np.zeros(0, np.int64)  # sorted by key
        self._index_end = 0  # bytes of the index that are read
        self._thread_lock = threading.Lock()
        with self._lock_folder():
            for name in ("vectors", "index"):
                (folder / name).touch()
            self._read_new_frames()

    def __len__(self) -> int:
        return len(self._keys)

    def fetch(self, keys: Sequence[bytes], compute: Callable[[list[int]], np.ndarray]) -> np.ndarray:
        """Return the vectors of some keys, float32 [N, width].

        Args:
            keys: N keys.
            compute: Computes the vectors that are not stored. It gets their indices in `keys`, ascending, each key once.
        """
        if not keys:
            return np.zeros((0, self._width), np.float32)
        with self._thread_lock:
            rows = self._find_rows(keys)
            first_index: dict[bytes, int] = {}
            for i in np.flatnonzero(rows < 0).tolist():
                first_index.setdefault(keys[i], i)
            if missing := list(first_index.values()):
                self._add([keys[i] for i in missing], compute(missing))
                rows = self._find_rows(keys)
            return np.array(np.memmap(self._folder / "vectors", np.float32, "r", shape=(len(self), self._width))[rows])

    def _find_rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the row of each key, -1 for a key that is not stored."""
        wanted = np.array(keys, self._keys.dtype)
        places = np.searchsorted(self._keys, wanted)
        rows = np.full(len(keys), -1)
        inside = np.flatnonzero(places < len(self))
        found = inside[self._keys[places[inside]] == wanted[inside]]
        rows[found] = self._rows[places[found]]
        return rows

    def _add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        with self._lock_folder():
            # Another process may have added some of the keys in the meantime.
            self._read_new_frames()
            new = [i for i, row in enumerate(self._find_rows(keys)) if row < 0]
            if not new:
                return
            # Truncate the index first, so that no incomplete frame can come to refer to the new vectors.
            os.truncate(self._folder / "index", self._index_end)
            self._write_at_end("vectors", len(self) * 4 * self._width, np.asarray(vectors[new], np.float32).tobytes())
            frame = UINT32.pack(len(new)) + b"".join(keys[i] for i in new)
            self._write_at_end("index", self._index_end, frame + UINT32.pack(zlib.crc32(frame)))
            self._read_new_frames()

    def _write_at_end(self, name: str, end: int, content: bytes) -> None:
        """Cut a file at `end` bytes, append to it, and wait until it is on disk."""
        with (self._folder / name).open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _read_new_frames(self) -> None:
        """Read the frames that were added since the last call, up to an incomplete one or one without all its vectors."""
        unindexed_rows = (self._folder / "vectors").stat().st_size // (4 * self._width) - len(self)
        with (self._folder / "index").open("rb") as file:
            file.seek(self._index_end)
            content = file.read()
        added, end = [], 0
        while frame := _read_frame(content, end):
            keys = np.frombuffer(frame, self._keys.dtype, offset=UINT32.size)
            unindexed_rows -= len(keys)
            if unindexed_rows < 0:
                break
            added.append(keys)
            end += len(frame) + UINT32.size
        self._index_end += end
        if added:
            keys = np.concatenate(added)
            order = np.argsort(keys)
            places = np.searchsorted(self._keys, keys[order])
            self._rows = np.insert(self._rows, places, len(self) + order)
            self._keys = np.insert(self._keys, places, keys[order])

    @contextmanager
    def _lock_folder(self) -> Iterator[None]:
        """Lock the folder, so that other processes neither read the index nor add vectors."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot store vectors ({error.strerror}). Make the folder writable, or set JAXEMBED_CACHE to "
                "another folder."
            ) from error


def make_text_key(first: str, second: str) -> bytes:
    """Return the key of a pair of texts: a query and a document, or a prompt and a text."""
    return hashlib.sha256(f"{len(first)} {first}{second}".encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def _read_frame(content: bytes, start: int) -> bytes:
    """Return the count and keys of the frame that begins at `start`; empty if the frame is incomplete or damaged."""
    if len(content) < start + UINT32.size:
        return b""
    end = start + UINT32.size + KEY_BYTES * UINT32.unpack_from(content, start)[0]
    if len(content) < end + UINT32.size:
        return b""
    frame = content[start:end]
    return frame if UINT32.unpack_from(content, end)[0] == zlib.crc32(frame) else b""
