"""Many texts in one row: best-fit packing inside a batch, and the arrays that describe it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import numpy as np

BUCKET_GROWTH = 1.06  # row counts come in steps of 6%: at most that much padding, and few programs to compile
FEW_ROWS = 32  # up to this many rows, where one is a large part of the batch, rows are shortened in steps of 1/32
FULL = 31 / 32  # of the tokens of shorter rows, which are worth it only where texts fill them

Packed = tuple[np.ndarray, np.ndarray, int]  # row of each text, its place there, rows used
Agree = Callable[[Iterator[int]], Iterator[int]]


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


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> Packed:
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


def pack_by_length(
    lengths: np.ndarray, shortest: int, at_once: Callable[[int], int]
) -> Iterator[tuple[np.ndarray, Packed, int]]:
    """Packs many texts into rows of several lengths, since attention costs a text what its row is long.

    Yields (texts, their packing, row length). Lengths halve from the power of two that takes the longest text to
    `shortest`. A length has the rows that texts beyond its half need, shorter ones between them, in full groups of
    `at_once(row length)`; what is left goes to its half where it fills all rows of that but the last, and stays otherwise.
    """
    left, length = np.arange(len(lengths)), max(shortest, 1 << (int(lengths.max(initial=1)) - 1).bit_length())
    packed = pack(lengths, length)
    while length > shortest:
        row, place, rows = packed
        group, half = at_once(length), length // 2
        needed = -(-int(np.count_nonzero(lengths[left] > half)) // group) * group
        kept = row < needed  # where the long texts are: they have opened rows before all others
        rest = left[~kept]
        shorter = pack(lengths[rest], half)
        if needed >= rows or lengths[rest].sum() <= FULL * (shorter[2] - 1) * half:
            break
        if needed:
            yield left[kept], (row[kept], place[kept], needed), length
        left, packed, length = rest, shorter, half
    yield left, packed, length


def bucket(rows: int) -> int:
    """The smallest row count of the static ladder that holds `rows`: 1, 2, 3, ... then steps of 6%."""
    size = 1
    while size < rows:
        size = max(size + 1, int(size * BUCKET_GROWTH))
    return size


def pack_shards(
    lengths: Sequence[np.ndarray], row_length: int, agree: Agree = lambda needed: needed
) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[int, int]]:
    """Packs each shard's texts: ((row, place) of each text, per shard) and the (rows, row length) that all shards share.

    The row count is a step of `bucket`'s ladder. FEW_ROWS or less are shortened as far as that count allows, so that the
    last row does not stay half empty: in steps of 8 tokens at least, to keep the programs few. `agree` takes the rows that
    the fullest shard needs at each length of `row_lengths`, as far as it is asked for, and gives those of the fullest of
    shards that are packed elsewhere too.
    """
    packed = functools.cache(lambda length: [pack(of_shard, length) for of_shard in lengths])
    longest = max((int(of_shard.max(initial=1)) for of_shard in lengths), default=1)
    shape = _shape(agree(_rows_needed(packed, longest, row_length)), row_length)
    return [(row, place) for row, place, _ in packed(shape[1])], shape


def row_lengths(row_length: int) -> range:
    """The row lengths to choose from, longest first."""
    return range(row_length, 0, -max(8, row_length // FEW_ROWS))


def _rows_needed(packed: Callable[[int], list[Packed]], longest: int, row_length: int) -> Iterator[int]:
    """The rows of the fullest shard at each row length that takes the longest text; they end where too many are needed."""
    for length in row_lengths(row_length):
        if length < longest:
            return
        rows = max(rows for _, _, rows in packed(length))
        yield rows
        if rows > bucket(FEW_ROWS):
            return


def _shape(needed: Iterator[int], row_length: int) -> tuple[int, int]:
    """The (rows, row length) of a batch, given the rows that it needs at each row length."""
    rows = next(needed)
    shape = (bucket(rows), row_length)
    if rows > FEW_ROWS:
        return shape
    for length, fewer_tokens in zip(row_lengths(row_length)[1:], needed, strict=False):
        if bucket(fewer_tokens) > shape[0]:
            break
        shape = (shape[0], length)
    return shape


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
