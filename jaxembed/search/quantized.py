"""Search quantized vectors, as `encode --precision` writes them, with FAISS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.files import exists
from jaxembed.search.nearest import DEFAULT_MEMORY_MB, SearchResult, choose_faiss_batch_size, select_best
from jaxembed.search.precision import (
    BYTE_VALUES,
    Precision,
    compute_steps,
    get_quantized_layout,
    needs_ranges,
    quantize_vectors,
    read_array,
)

OVERSAMPLING = 4  # candidates by Hamming distance, per returned document


def search_quantized(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    precision: Precision,
    ranges: np.ndarray | None = None,
    memory_mb: int = DEFAULT_MEMORY_MB,
) -> SearchResult:
    """Return the k best quantized documents of each query, best first. Needs FAISS.

    Queries stay float32.

    - int8 and uint8: A score is the dot product of the query with the midpoints of the document's quantization steps.
    - binary and ubinary: The search takes the 4 k documents with the smallest Hamming distance. It orders them by the dot
      product of the query with the document's signs, scaled to unit length.

    Args:
        queries: Unit vectors, float32 [Q, W].
        documents: Quantized vectors [N, columns], as `get_quantized_layout` describes them.
        k: Documents to return per query.
        precision: Precision of the documents.
        ranges: Ranges for int8 and uint8, float32 [2, W].
        memory_mb: Memory of the search in MiB.

    Returns:
        Indices and scores, [Q, min(k, N)].

    Raises:
        UserError: FAISS is not installed, the ranges are missing, or the documents have another layout.
    """
    faiss, width = import_faiss("search_quantized"), queries.shape[1]
    check_layout(documents, precision, width, "search_quantized: documents are")
    if needs_ranges(precision) and ranges is None:
        raise UserError(f"search_quantized: {precision} needs ranges (found none). Pass those of the documents.")
    if not (k := min(k, len(documents))):
        return SearchResult(np.zeros((len(queries), 0), np.int32), np.zeros((len(queries), 0), np.float32))
    batch_size = choose_faiss_batch_size(memory_mb, k)
    if precision.endswith("binary"):
        # The candidates of a query: packed bits, bits, and signs in float32.
        bytes_per_query = 6 * min(OVERSAMPLING * k, len(documents)) * width
        batch_size = max(1, min(batch_size, memory_mb * 2**20 // bytes_per_query))
    blocks = [queries[start : start + batch_size] for start in range(0, len(queries), batch_size)]
    if precision == "float32":
        results = [faiss.knn(block, documents, k, faiss.METRIC_INNER_PRODUCT) for block in blocks]
    elif ranges is not None and needs_ranges(precision):
        index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit_direct, faiss.METRIC_INNER_PRODUCT)
        index.add(_to_unsigned(documents))
        results = [_search_levels(index, block, ranges, k) for block in blocks]
    else:
        numbers = _to_unsigned(documents)
        bits = faiss.IndexBinaryFlat(8 * numbers.shape[1])
        bits.add(numbers)
        results = [_search_bits(bits, block, numbers, k) for block in blocks]
    empty = (np.zeros((0, k), np.float32), np.zeros((0, k), np.int64))
    scores, rows = (np.concatenate(parts) for parts in zip(empty, *results, strict=True))
    return SearchResult(rows.astype(np.int32), scores.astype(np.float32))


def import_faiss(where: str) -> Any:
    """Import FAISS. Raise `UserError` that starts with `where` if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(f"{where}: faiss is not installed. Run pip install '.[eval]'.") from None
    return faiss


def check_layout(documents: np.ndarray, precision: Precision, width: int, where: str) -> None:
    """Raise `UserError` that starts with `where` unless documents are quantized vectors of a width."""
    dtype, columns = get_quantized_layout(precision, width)
    if documents.ndim != 2 or (documents.dtype, documents.shape[1]) != (dtype, columns):
        layout = f"{documents.dtype} of {documents.shape[-1]} columns" if documents.ndim == 2 else f"of shape {documents.shape}"
        raise UserError(f"{where} {layout} (expected {dtype} of {columns}: {precision} vectors of {width} numbers).")


def read_documents(path: Path) -> np.ndarray:
    """Read the vectors in a .npy file, as `encode` writes them.

    Raises:
        UserError: The file is missing, or holds no vectors, or some that are not finite.
    """
    if not exists(path):
        raise UserError(f"--search: no such file {path} (expected vectors of documents). Write it with jaxembed encode.")
    documents = read_array(path, f"--search {path}")
    if not len(np.atleast_1d(documents)):
        raise UserError(f"--search {path}: has no vectors. Name another file.")
    if documents.dtype.kind == "f" and not np.isfinite(documents).all():
        raise UserError(f"--search {path}: has numbers that are not finite. Write it again with jaxembed encode.")
    return documents


def _to_unsigned(documents: np.ndarray) -> np.ndarray:
    """Return int8 or uint8 vectors as uint8, as FAISS takes them."""
    if documents.dtype == np.uint8:
        return documents
    return (documents.astype(np.int16) + BYTE_VALUES // 2).astype(np.uint8)


def _search_levels(index: Any, queries: np.ndarray, ranges: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and rows, [q, k] each, of the documents with the largest dot product, given an index of their levels."""
    steps = compute_steps(ranges)
    scores, rows = index.search(np.ascontiguousarray(queries * steps), k)
    # The middle of a step is start + (level + 1/2) * step, so the rest of a score depends only on the query.
    return scores + (queries @ (ranges[0] + steps / 2))[:, None], rows


def _search_bits(index: Any, queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and rows, [q, k] each, of the documents with the smallest Hamming distance, ordered by dot product."""
    _, rows = index.search(quantize_vectors(queries, "ubinary"), min(OVERSAMPLING * k, len(documents)))
    signs = np.where(np.unpackbits(documents[rows], axis=-1, count=queries.shape[1]), np.float32(1), np.float32(-1))
    scores = np.einsum("qd,qkd->qk", queries, signs) / np.sqrt(queries.shape[1])
    best = select_best(rows, scores, k)
    return best.scores, best.indices
