"""Search of vectors that do not fit into memory: read from a .npy file block by block, by one process or by several."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError
from jaxembed.search.nearest import DEFAULT_MEMORY_MB, SearchResult, search, select_best

MAX_HEADER_BYTES = 10_000


class VectorFile:
    """The vectors of a .npy file, as `jaxembed.encode` writes it, read in slices. Nothing is kept in memory.

    The file is not memory-mapped: a file that is truncated while it is read would end the process, and mapped pages count as
    memory of the process.

    Attributes:
        path: The file.
        shape: Number and width of the vectors.
        dtype: Their dtype.
    """

    def __init__(self, path: Path | str):
        """Read the header.

        Args:
            path: The file.

        Raises:
            UserError: The file is not a .npy file of float16 or float32 vectors, or it is incomplete.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, is_fortran, self.dtype = read_header(file, max_header_size=MAX_HEADER_BYTES)
                self._start = file.tell()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a .npy file ({error}). Write one with jaxembed encode.") from None
        if len(shape) != 2 or is_fortran or self.dtype not in (np.dtype("<f4"), np.dtype("<f2")):
            raise UserError(
                f"{path}: not a file of vectors (found {self.dtype} {list(shape)}; expected float32 or float16 [N, D]). "
                "Write one with jaxembed encode."
            )
        self.shape = (int(shape[0]), int(shape[1]))
        expected_size, size = self._start + self.dtype.itemsize * math.prod(self.shape), self.path.stat().st_size
        if size < expected_size:
            raise UserError(f"{path}: incomplete (found {size:,} bytes; expected {expected_size:,}). Write it again.")

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, end: int) -> Float[np.ndarray, "n d"]:
        """Return the vectors of the rows from `start` up to `end`, in float32.

        Raises:
            UserError: The file has become shorter.
        """
        block = np.empty((min(end, len(self)) - start, self.shape[1]), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + start * self.dtype.itemsize * self.shape[1])
            view, num_read = block.data.cast("B"), 0
            while num_read < block.nbytes and (count := file.readinto(view[num_read:])):
                num_read += count
            if hasattr(os, "posix_fadvise"):  # these pages are not read again before the next pass
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if num_read < block.nbytes:
            raise UserError(f"{self.path}: became shorter while it was read. Write it again.")
        return block.astype(np.float32, copy=False)


def search_file(
    queries: Float[np.ndarray, "q d"],
    documents: VectorFile,
    k: int,
    *,
    memory_mb: int = DEFAULT_MEMORY_MB,
    processes: int = 1,
    show_progress: bool = False,
) -> SearchResult:
    """Find the k documents of a file that are nearest to each query by dot product. The result is that of `search`.

    Args:
        queries: Query vectors.
        documents: The file of the documents.
        k: Documents per query. If there are fewer documents, all are returned.
        memory_mb: Memory of all processes together in MiB, besides the queries and the result.
        processes: Processes that each search a part of the file.
        show_progress: Show a progress bar. Several processes show none.

    Returns:
        Rows in the file and scores, [Q, min(k, N)]. Of equal scores, the document with the lower row is first.

    Raises:
        UserError: The widths of queries and documents differ, or the file cannot be read.
    """
    if queries.shape[1] != documents.shape[1]:
        raise UserError(
            f"{documents.path}: its vectors have {documents.shape[1]} dimensions, those of the queries {queries.shape[1]}. "
            "Encode both with the same model and --dim."
        )
    if processes == 1:
        return search_part(queries, documents, k, (0, len(documents)), memory_mb, show_progress)
    bounds = np.linspace(0, len(documents), processes + 1).astype(int).tolist()
    # New interpreters: a fork would copy the threads' locks of JAX and BLAS.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(search_part, queries, documents, k, part, memory_mb // processes) for part in pairwise(bounds)]
        return merge_results([part.result() for part in parts], k)


def search_part(
    queries: np.ndarray, documents: VectorFile, k: int, part: tuple[int, int], memory_mb: int, show_progress: bool = False
) -> SearchResult:
    """Search the rows of a part of a file. Machines that search a part each merge their results by `merge_results`.

    Args:
        queries: Query vectors.
        documents: The file.
        k: Documents per query.
        part: First row, and the row after the last one.
        memory_mb: Memory in MiB. Half of it holds a block of documents, the other half is for its search.
        show_progress: Show a progress bar.
    """
    start, end = part
    # A block of float16 is in memory a second time, in float32.
    bytes_per_row = (4 + (documents.dtype.itemsize == 2) * 2) * documents.shape[1]
    step = max(1, memory_mb * 2**19 // bytes_per_row)
    best = SearchResult(np.zeros((len(queries), 0), np.int32), np.zeros((len(queries), 0), np.float32))
    for first in progress_bar(range(start, end, step), unit="block", desc="search", disable=not show_progress):
        result = search(queries, documents.read(first, min(first + step, end)), k, memory_mb=max(1, memory_mb // 2))
        best = merge_results([best, SearchResult(result.indices + np.int32(first), result.scores)], k)
    return best


def merge_results(parts: Sequence[SearchResult], k: int) -> SearchResult:
    """Merge the best documents of parts that follow each other.

    Args:
        parts: Results [Q, k'] of each part, in the order of their rows.
        k: Documents per query.

    Returns:
        The k best of all. Of equal scores, the document with the lower row is first.
    """
    rows, scores = (np.concatenate([part[i] for part in parts], axis=1) for i in range(2))
    return select_best(rows, scores, k)
