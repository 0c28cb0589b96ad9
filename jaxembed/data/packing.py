"""Many texts in one row: best-fit packing inside a batch, and the arrays that describe it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np

BUCKET_GROWTH = 1.06  # row counts come in steps of 6%: at most that much padding, and few programs to compile
FEW_ROWS = 32  # up to this many rows, where one is a large part of the batch, rows are shortened in steps of 1/32


@flax.struct.dataclass
class PackedTexts:
    """R rows of T tokens; a text is a segment of a row.

    tokens, segment_ids (0 = padding), positions (restart per segment): int32 [R, T]; pool_mask: bool [R, T].
    segments: texts a row holds at most (S); shards: rows are shard-major in this many equal parts. A text's slot is
    row * S + segment - 1, counted inside its shard.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    pool_mask: Any
    segments: int = flax.struct.field(pytree_node=False)
    shards: int = flax.struct.field(pytree_node=False)


def max_segments(row_length: int) -> int:
    """Texts a row may hold: one per 8 tokens, so that the pooled vectors have a static shape."""
    return max(1, row_length // 8)


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best-fit decreasing: (row of each text, its place in the row from 0, number of rows used).

    A bit set of the free lengths in use finds the fullest row that still takes a text in constant time. Deterministic.
    """
    limit = max_segments(row_length)
    row, place = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free length
    free_lengths = 0
    texts_in: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[i])
        fitting = free_lengths >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            r = open_rows[free].pop()
            if not open_rows[free]:
                free_lengths &= ~(1 << free)
        else:
            free, r = row_length, len(texts_in)
            texts_in.append(0)
        row[i], place[i] = r, texts_in[r]
        texts_in[r] += 1
        if texts_in[r] < limit:
            open_rows[free - length].append(r)
            free_lengths |= 1 << (free - length)
    return row, place, len(texts_in)


def bucket(rows: int) -> int:
    """The smallest row count of the static ladder that holds `rows`: 1, 2, 3, ... then steps of 6%."""
    size = 1
    while size < rows:
        size = max(size + 1, int(size * BUCKET_GROWTH))
    return size


def pack_shards(lengths: Sequence[np.ndarray], row_length: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[int, int]]:
    """Packs each shard's texts: ((row, place) of each text, per shard) and the (rows, row length) that all shards share.

    The row count is a step of `bucket`'s ladder. FEW_ROWS or less are shortened as far as that count allows, so that the
    last row does not stay half empty: in steps of 8 tokens at least, to keep the programs few.
    """
    rows, packs = _packed(lengths, row_length)
    longest = max((int(of_shard.max(initial=1)) for of_shard in lengths), default=1)
    step, shape = max(8, row_length // FEW_ROWS), (bucket(rows), row_length)
    shorter = row_length - step
    while rows <= FEW_ROWS and shorter >= longest:
        fewer_tokens = _packed(lengths, shorter)
        if bucket(fewer_tokens[0]) > shape[0]:
            break
        packs, shape, shorter = fewer_tokens[1], (shape[0], shorter), shorter - step
    return packs, shape


def _packed(lengths: Sequence[np.ndarray], row_length: int) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    """The row count of the fullest shard, and each shard's packing."""
    packs = [pack(of_shard, row_length) for of_shard in lengths]
    return max(rows for _, _, rows in packs), [(row, place) for row, place, _ in packs]


def fill(
    texts: Sequence[np.ndarray],
    pool_from: Sequence[int] | np.ndarray,
    row: np.ndarray,
    place: np.ndarray,
    shape: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Writes token arrays into [rows, row_length] arrays at their rows, in the order of their places.

    Tokens before `pool_from` of a text are kept out of its pooling (instruction tokens).
    """
    lengths = np.array([len(t) for t in texts], np.int64)
    order = np.lexsort((place, row))
    sorted_row, sorted_length = row[order], lengths[order]
    ends = np.cumsum(sorted_length)
    row_begin = np.searchsorted(sorted_row, sorted_row)  # first text of the same row
    start = np.empty_like(lengths)
    start[order] = (ends - sorted_length) - (ends - sorted_length)[row_begin]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(row * shape[1] + start, lengths) + within
    flat = {name: np.zeros(shape[0] * shape[1], np.int32) for name in ("tokens", "segment_ids", "positions")}
    flat["tokens"][at] = np.concatenate(texts) if len(texts) else []
    flat["segment_ids"][at] = np.repeat(place + 1, lengths)
    flat["positions"][at] = within
    flat["pool_mask"] = np.zeros(shape[0] * shape[1], bool)
    flat["pool_mask"][at] = within >= np.repeat(np.asarray(pool_from), lengths)
    return {name: array.reshape(shape) for name, array in flat.items()}
