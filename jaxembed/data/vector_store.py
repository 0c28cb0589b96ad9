"""Store vectors on disk by key, so that later runs read the computed vectors back, bit for bit."""

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
from jaxembed.files import make_private_folder

KEY_BYTES = 16
PACKED_UINT32, UINT32 = struct.Struct("<I"), np.dtype("<u4")
VECTORS_FILE, INDEX_FILE = "vectors-v2", "index-v2"


class VectorStore:
    """float32 vectors of one width by keys of 16 bytes, in a folder that threads and processes may share.

    The file `vectors-v2` holds one row after another. The file `index-v2` holds one frame per addition: the number of its keys,
    the keys, a CRC-32 of each vector, and a CRC-32 of all that. A vector is checked whenever it is read.

    A frame is written after its vectors are on disk, so a kill leaves an addition complete or absent. The next addition
    overwrites the remains of an incomplete one. A key keeps its first vector.

    Only the owner of the folder can read and write it. Files without `-v2` have an earlier format, without checksums of the
    vectors, and are not read.
    """

    def __init__(self, folder: Path, width: int):
        """Open or create a store.

        Args:
            folder: Folder of the store.
            width: Width of the vectors.

        Raises:
            UserError: The folder cannot be written, or belongs to another user.
        """
        self._folder, self._width = folder, width
        self._keys, self._rows = np.zeros(0, f"S{KEY_BYTES}"), np.zeros(0, np.int64)  # sorted by key
        self._checksums = np.zeros(0, UINT32)  # of the vectors, by row
        self._index_end = 0  # bytes of the index that are read
        self._thread_lock = threading.Lock()
        with self._lock_folder():
            for name in (VECTORS_FILE, INDEX_FILE):
                (folder / name).touch()
            self._read_new_frames()

    def __len__(self) -> int:
        return len(self._keys)

    def fetch(self, keys: Sequence[bytes], compute: Callable[[list[int]], np.ndarray]) -> np.ndarray:
        """Return the vectors of some keys, float32 [N, width].

        Args:
            keys: N keys.
            compute: Computes the vectors that are not stored, given their indices in `keys`, ascending, each key once.

        Raises:
            UserError: Stored vectors are damaged, or the folder cannot be written.
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
            return self._read(rows)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows. Raises `UserError` if one has changed since it was stored."""
        vectors = np.zeros((len(rows), self._width), np.float32)
        with (self._folder / VECTORS_FILE).open("rb", buffering=0) as file:  # no memory map: a truncated file would be a SIGBUS
            for vector, row in zip(vectors, rows.tolist(), strict=True):
                os.preadv(file.fileno(), [vector.data], row * vector.nbytes)
        damaged_rows = np.flatnonzero(_compute_checksums(vectors) != self._checksums[rows])
        if damaged_rows.size:
            raise UserError(
                f"{self._folder}: the stored vectors are damaged ({damaged_rows.size} of the {len(rows)} read differ from "
                "their checksums). Remove this folder, and they are computed again."
            )
        return vectors

    def _find_rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the row of each key, -1 for a key that is not stored."""
        wanted_keys = np.array(keys, self._keys.dtype)
        positions = np.searchsorted(self._keys, wanted_keys)
        rows = np.full(len(keys), -1)
        inside = np.flatnonzero(positions < len(self))
        matches = inside[self._keys[positions[inside]] == wanted_keys[inside]]
        rows[matches] = self._rows[positions[matches]]
        return rows

    def _add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        with self._lock_folder():
            # Another process may have added some of the keys in the meantime.
            self._read_new_frames()
            new = [i for i, row in enumerate(self._find_rows(keys)) if row < 0]
            if not new:
                return
            # Truncate the index first, so that no incomplete frame can come to refer to the new vectors.
            os.truncate(self._folder / INDEX_FILE, self._index_end)
            new_vectors = np.asarray(vectors[new], np.float32)
            self._write_at_end(VECTORS_FILE, len(self) * 4 * self._width, new_vectors.tobytes())
            frame = PACKED_UINT32.pack(len(new)) + b"".join(keys[i] for i in new) + _compute_checksums(new_vectors).tobytes()
            self._write_at_end(INDEX_FILE, self._index_end, frame + PACKED_UINT32.pack(zlib.crc32(frame)))
            self._read_new_frames()

    def _write_at_end(self, name: str, end: int, content: bytes) -> None:
        """Truncate a file to `end` bytes, append to it, and wait until it is on disk."""
        with (self._folder / name).open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _read_new_frames(self) -> None:
        """Read the frames that were added since the last call, up to an incomplete one or one without all its vectors."""
        unindexed_rows = (self._folder / VECTORS_FILE).stat().st_size // (4 * self._width) - len(self)
        with (self._folder / INDEX_FILE).open("rb") as file:
            file.seek(self._index_end)
            content = file.read()
        # Parse the frames whose vectors are in the file. The end of the last one is where the next call continues.
        new_keys, checksums, end = [], [], 0
        while frame := _read_frame(content, end):
            count = PACKED_UINT32.unpack_from(frame)[0]
            keys = np.frombuffer(frame, self._keys.dtype, count, offset=PACKED_UINT32.size)
            unindexed_rows -= len(keys)
            if unindexed_rows < 0:
                break
            new_keys.append(keys)
            checksums.append(np.frombuffer(frame, UINT32, count, offset=PACKED_UINT32.size + KEY_BYTES * count))
            end += len(frame) + PACKED_UINT32.size
        self._index_end += end
        # Insert the new keys into the sorted ones. Checksums stay in the order of the vectors.
        if new_keys:
            keys = np.concatenate(new_keys)
            order = np.argsort(keys)
            positions = np.searchsorted(self._keys, keys[order])
            self._rows = np.insert(self._rows, positions, len(self) + order)
            self._keys = np.insert(self._keys, positions, keys[order])
            self._checksums = np.concatenate([self._checksums, *checksums])

    @contextmanager
    def _lock_folder(self) -> Iterator[None]:
        """Lock the folder, so that other processes neither read the index nor add vectors."""
        try:
            make_private_folder(self._folder)
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
    """Return the count, keys, and checksums of the frame that starts at `start`; empty if it is incomplete or damaged."""
    if len(content) < start + PACKED_UINT32.size:
        return b""
    count = PACKED_UINT32.unpack_from(content, start)[0]
    end = start + PACKED_UINT32.size + (KEY_BYTES + UINT32.itemsize) * count
    if len(content) < end + PACKED_UINT32.size:
        return b""
    frame = content[start:end]
    return frame if PACKED_UINT32.unpack_from(content, end)[0] == zlib.crc32(frame) else b""


def _compute_checksums(vectors: np.ndarray) -> np.ndarray:
    """Return the CRC-32 of each vector, uint32 [N]."""
    return np.array([zlib.crc32(vector) for vector in np.ascontiguousarray(vectors)], UINT32)
