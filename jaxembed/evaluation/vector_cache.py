"""Cache the vectors of a task while it is scored: in memory up to a limit, and beyond it in memory-mapped files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from jaxembed.data.npy_writer import write_header
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, exists, make_private_folder

DEFAULT_MEMORY_GIB = 4.0
CACHE_FILE = re.compile(r"[0-9a-f]{64}\.npy(\.partial)?")  # name of a file of the cache


class VectorCache:
    """The cache of the vectors of the current task.

    Vectors are kept per call, by a digest of the texts and the prompt. A call whose vectors no longer fit in memory is written
    to a file while it is encoded. Files of an interrupted task are reused.
    """

    def __init__(self, folder: Path, revision: str, width: int, memory_bytes: int, keeps_arrays: bool):
        """Create the cache of a run.

        Args:
            folder: Folder of the files. After every task they are removed, and the folder too if it has no other files.
            revision: Identifies everything that the vectors depend on.
            width: Width of the vectors.
            memory_bytes: Maximum bytes of vectors in memory.
            keeps_arrays: Whether vectors that fit in memory are kept for later calls, because a task encodes texts repeatedly.
                Vectors in files are always kept.
        """
        self._folder, self._revision, self._width = folder, revision, width
        self._memory_bytes, self._keeps_arrays = memory_bytes, keeps_arrays
        self._arrays: dict[str, np.ndarray] = {}
        self._used_bytes = 0

    def fetch(self, texts: Sequence[str], prompt: str, encode: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
        """Return the vectors of some texts, float32 [N, width].

        Args:
            texts: N texts.
            prompt: Their prompt.
            encode: Computes the vectors, part by part.

        Raises:
            UserError: The vectors cannot be written.
        """
        needed_bytes = 4 * self._width * len(texts)
        fits = self._used_bytes + needed_bytes <= self._memory_bytes
        if fits and not self._keeps_arrays:
            return self._concatenate(encode())
        key = self._make_key(texts, prompt)
        if key not in self._arrays:
            self._arrays[key] = self._concatenate(encode()) if fits else self._map_file(key, len(texts), encode)
            self._used_bytes += needed_bytes if fits else 0
        return self._arrays[key]

    def clear(self) -> None:
        """Drop the vectors of a finished task, and remove its files."""
        self._arrays, self._used_bytes = {}, 0
        with suppress(OSError):  # there is no folder, or it has files of the user
            for path in self._folder.iterdir():
                if CACHE_FILE.fullmatch(path.name):
                    path.unlink()
            self._folder.rmdir()

    def _make_key(self, texts: Sequence[str], prompt: str) -> str:
        """Return the SHA-256 of everything that the vectors depend on."""
        digest = hashlib.sha256()
        for part in (self._revision, prompt, *texts):
            digest.update(f"{len(part)} {part}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _concatenate(self, parts: Iterator[np.ndarray]) -> np.ndarray:
        vectors = list(parts)
        return np.concatenate(vectors) if vectors else np.zeros((0, self._width), np.float32)

    def _map_file(self, key: str, count: int, encode: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
        """Return vectors mapped from a file, which is written if it does not exist."""
        path = self._folder / f"{key}.npy"
        if not exists(path):
            try:
                make_private_folder(self._folder)
                with atomic_write(path) as partial:
                    _write_vectors(partial, count, self._width, encode())
            except OSError as error:
                raise UserError(
                    f"{path}: the vectors of a task cannot be written ({error.strerror}). Free space, or raise --vector-memory."
                ) from None
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _write_vectors(path: Path, count: int, width: int, parts: Iterable[np.ndarray]) -> None:
    """Write a .npy file part by part. Ordinary writes raise an error on a full disk; mapped writes would crash."""
    with path.open("wb") as file:
        write_header(file, (count, width))
        for part in parts:
            file.write(np.ascontiguousarray(part, "<f4").tobytes())
