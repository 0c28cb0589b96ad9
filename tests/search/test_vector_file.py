"""Search of a file of vectors, block by block and by several processes: equal to the search of all vectors in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxembed.errors import UserError
from jaxembed.search import vector_file
from jaxembed.search.nearest import SearchResult, search
from jaxembed.search.vector_file import VectorFile, merge_results, search_file, search_part


def write_vectors(folder: Path, dtype: str, count: int = 3000) -> tuple[np.ndarray, np.ndarray, VectorFile]:
    """Write vectors of small integers, so that many scores are equal. Return queries, documents and the file."""
    random = np.random.default_rng(0)
    queries, documents = (random.integers(-3, 4, (n, 64)).astype(dtype) for n in (20, count))
    np.save(folder / "vectors.npy", documents)
    return queries.astype(np.float32), documents.astype(np.float32), VectorFile(folder / "vectors.npy")


def assert_same(found: SearchResult, expected: SearchResult) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert (found.indices.dtype, found.scores.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_is_searched_in_blocks(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents, file = write_vectors(tmp_path, dtype)
    blocks: list[int] = []

    def record(queries: Any, documents: Any, k: int, **options: Any) -> SearchResult:
        blocks.append(documents.nbytes)
        return search(queries, documents, k, **options)

    monkeypatch.setattr(vector_file, "search", record)
    assert_same(search_file(queries, file, 7, memory_mb=1), search(queries, documents, 7))
    assert len(blocks) > 1 and max(blocks) <= 2**19
    assert search_file(queries, file, 5000).indices.shape == (20, 3000)


def test_parts_of_several_processes_are_merged(tmp_path: Path) -> None:
    queries, documents, file = write_vectors(tmp_path, "float32")
    expected = search(queries, documents, 7)
    parts = [search_part(queries, file, 7, part, 1) for part in ((0, 4), (4, 2000), (2000, 3000))]
    assert parts[0].indices.shape == (20, 4)
    assert_same(merge_results(parts, 7), expected)
    assert_same(search_file(queries, file, 7, processes=2), expected)


def test_files_that_are_no_vectors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npy"
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"vectors\.npy: not a \.npy file \(.*\)\. Write one with jaxembed encode\.$"):
        VectorFile(path)
    for array in (np.zeros(3, np.float32), np.zeros((3, 2), np.int8), np.zeros((3, 2), np.float32, order="F")):
        np.save(path, array)
        with pytest.raises(
            UserError, match=r"not a file of vectors \(found .*; expected float32 or float16 \[N, D\]\)\. Write"
        ):
            VectorFile(path)
    _, _, file = write_vectors(tmp_path, "float32")
    with pytest.raises(UserError, match=r"its vectors have 64 dimensions, those of the queries 8\. Encode both"):
        search_file(np.zeros((1, 8), np.float32), file, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"vectors\.npy: incomplete \(found 768,127 bytes; expected 768,128\)\. Write it again\.$"
    ):
        VectorFile(path)
    with pytest.raises(UserError, match="became shorter while it was read"):
        file.read(0, 3000)
