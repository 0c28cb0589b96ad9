"""Pack many texts into one row: best-fit packing inside a batch, and the arrays that describe it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import numpy as np

ROW_COUNT_GROWTH = 1.06  # ratio of successive row counts: at most 6% padding, but few programs to compile
MAX_ROWS_TO_SHORTEN = 32  # up to this many rows, where one row is a large part of the batch, rows may be shorter
LENGTH_STEPS = 16  # shorter rows come in this many lengths, or fewer: each is a program to compile
MIN_FILL = 31 / 32  # share of the tokens of shorter rows that texts must fill to make them worthwhile
TOKENS_PER_SEGMENT = 8  # a row has room for one text per this many tokens

SyncRowCounts = Callable[[Iterator[int]], Iterator[int]]  # rows that this process needs -> rows that any process needs


class Packing(NamedTuple):
    """The place of each of N texts.

    Attributes:
        row: Row of each text, int64 [N].
        segment: Index of each text in its row, from 0, int64 [N].
        row_count: Number of rows used.
    """

    row: np.ndarray
    segment: np.ndarray
    row_count: int


@flax.struct.dataclass
class PackedTexts:
    """R rows of T tokens. A text is a segment of a row.

    The slot of a text is row * S + segment, counted inside its shard, with segments counted from 0.

    Attributes:
        tokens: Token ids, int32 [R, T].
        segment_ids: Segment of each token, counted from 1, 0 for padding, int32 [R, T].
        positions: Position of each token in its text, int32 [R, T].
        pool_mask: True for tokens that are pooled, bool [R, T].
        segments: Maximum texts of a row (S).
        shards: Number of equal parts of the rows, which are shard-major.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    pool_mask: Any
    segments: int = flax.struct.field(pytree_node=False)
    shards: int = flax.struct.field(pytree_node=False)


def compute_max_segments(row_length: int) -> int:
    """Return the maximum texts of a row. It is fixed so that the pooled vectors have a static shape."""
    return max(1, row_length // TOKENS_PER_SEGMENT)


def pack_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> Packing:
    """Pack texts into rows by best-fit decreasing. The result is deterministic.

    Args:
        lengths: Tokens of each text, at most `row_length`.
        row_length: Tokens of a row.
    """
    max_texts = compute_max_segments(row_length)
    row, segment = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    # Open rows by their free tokens. Bit n of `free_bits` is set if there is an open row with n free tokens, so the fullest
    # row with room for a text is found in constant time.
    rows_by_free: list[list[int]] = [[] for _ in range(row_length + 1)]
    free_bits = 0
    texts_in_row: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[i])
        # Take the open row with the fewest free tokens that are enough, else open a new row.
        fitting = free_bits >> length
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            free = length + lowest_bit
            r = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_bits &= ~(1 << free)
        else:
            free, r = row_length, len(texts_in_row)
            texts_in_row.append(0)
        # Place the text, and keep the row open while it may hold more texts.
        row[i], segment[i] = r, texts_in_row[r]
        texts_in_row[r] += 1
        if texts_in_row[r] < max_texts:
            rows_by_free[free - length].append(r)
            free_bits |= 1 << (free - length)
    return Packing(row, segment, len(texts_in_row))


def pack_by_length(
    lengths: np.ndarray, min_row_length: int, rows_per_call: Callable[[int], int]
) -> Iterator[tuple[np.ndarray, Packing, int]]:
    """Pack many texts into rows of several lengths, because the cost of attention for a text grows with its row length.

    Row lengths halve from the power of two that fits the longest text down to `min_row_length`. The number of rows of a length
    is what the texts longer than half of it need, rounded up to full calls; shorter texts fill the gaps. The remaining texts go
    to rows of half the length if they fill these, and otherwise stay.

    Args:
        lengths: Tokens of each text, int64 [N].
        min_row_length: Shortest row length, a power of two.
        rows_per_call: Maps a row length to the number of rows per program call.

    Yields:
        Indices of texts, their packing, and its row length.
    """
    # Start with all texts in rows that take the longest one.
    longest = int(lengths.max(initial=1))
    texts, row_length = np.arange(len(lengths)), max(min_row_length, 1 << (longest - 1).bit_length())
    packing = pack_rows(lengths, row_length)
    while row_length > min_row_length:
        # Keep the rows that hold texts too long for half the length. Texts are packed by decreasing length, so these texts
        # opened the first rows.
        call_rows, half_length = rows_per_call(row_length), row_length // 2
        long_texts = int(np.count_nonzero(lengths[texts] > half_length))
        rows_to_keep = -(-long_texts // call_rows) * call_rows
        stays = packing.row < rows_to_keep
        # Pack the other texts into rows of half the length. Stop if there are none, or if they leave too much padding: they
        # must fill all rows but the last one.
        other_texts = texts[~stays]
        shorter = pack_rows(lengths[other_texts], half_length)
        if rows_to_keep >= packing.row_count or lengths[other_texts].sum() <= MIN_FILL * (shorter.row_count - 1) * half_length:
            break
        if rows_to_keep:
            yield texts[stays], Packing(packing.row[stays], packing.segment[stays], rows_to_keep), row_length
        texts, packing, row_length = other_texts, shorter, half_length
    yield texts, packing, row_length


def split_rows(row_count: int, rows_per_call: int, shards: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, row after the last one, rows with padding) of each call.

    The last call pads its shards' rows to a power of two.
    """
    for first in range(0, row_count, rows_per_call):
        end = min(first + rows_per_call, row_count)
        per_shard = -(-(end - first) // shards)
        yield first, end, min(rows_per_call, shards << (per_shard - 1).bit_length())


def round_up_rows(rows: int) -> int:
    """Return the smallest allowed row count that is at least `rows`: 1, 2, 3, ..., then in steps of 6%."""
    size = 1
    while size < rows:
        size = max(size + 1, int(size * ROW_COUNT_GROWTH))
    return size


def pack_shards(
    lengths: Sequence[np.ndarray], row_length: int, sync: SyncRowCounts = lambda needed: needed
) -> tuple[list[Packing], tuple[int, int]]:
    """Pack the texts of each shard into rows of one shape.

    The row count is an allowed one (`round_up_rows`). Up to MAX_ROWS_TO_SHORTEN rows are shortened as far as that count allows,
    so that the last row does not stay half empty.

    Args:
        lengths: Tokens of each text, for each shard.
        row_length: Maximum tokens of a row.
        sync: Maps the row counts that the fullest shard of this process needs, one for each of `list_candidate_row_lengths`, to
            the maxima over all processes. Both iterators may end early.

    Returns:
        The packing of each shard, and the shape (rows, row length) that all shards share.
    """
    pack_at = functools.cache(lambda length: [pack_rows(shard_lengths, length) for shard_lengths in lengths])
    longest = max((int(shard_lengths.max(initial=1)) for shard_lengths in lengths), default=1)
    shape = _choose_shape(sync(_iter_rows_needed(pack_at, longest, row_length)), row_length)
    return pack_at(shape[1]), shape


def list_candidate_row_lengths(row_length: int) -> range:
    """Return the row lengths to choose from, longest first.

    Steps are 1/16 of `row_length`, and at least 8 tokens, so that few programs are compiled.
    """
    return range(row_length, 0, -max(8, row_length // LENGTH_STEPS))


def _iter_rows_needed(pack_at: Callable[[int], list[Packing]], longest: int, row_length: int) -> Iterator[int]:
    """Yield the rows that the fullest shard needs at each candidate length, until there are too many or they are too short."""
    for length in list_candidate_row_lengths(row_length):
        if length < longest:
            return
        rows = max(packing.row_count for packing in pack_at(length))
        yield rows
        if rows > round_up_rows(MAX_ROWS_TO_SHORTEN):
            return


def _choose_shape(rows_needed: Iterator[int], row_length: int) -> tuple[int, int]:
    """Return the (rows, row length) of a batch, from the rows needed at each of `list_candidate_row_lengths`."""
    # The row count follows from rows of full length.
    rows = next(rows_needed)
    shape = (round_up_rows(rows), row_length)
    if rows > MAX_ROWS_TO_SHORTEN:
        return shape
    # Take the shortest row length that needs no more rows.
    for length, rows_at_length in zip(list_candidate_row_lengths(row_length)[1:], rows_needed, strict=False):
        if round_up_rows(rows_at_length) > shape[0]:
            break
        shape = (shape[0], length)
    return shape


def fill_rows(
    texts: Sequence[np.ndarray],
    pool_start: Sequence[int] | np.ndarray,
    row: np.ndarray,
    segment: np.ndarray,
    shape: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Write token arrays into rows.

    Args:
        texts: Token ids of each text.
        pool_start: Index of the first pooled token of each text. Earlier tokens (the instruction) are not pooled.
        row: Row of each text.
        segment: Index of each text in its row, from 0.
        shape: (rows, row length) of the arrays.

    Returns:
        The arrays of `PackedTexts` by name.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    index, position = locate_tokens(lengths, row, segment, shape[1])
    flat = {name: np.zeros(shape[0] * shape[1], np.int32) for name in ("tokens", "segment_ids", "positions")}
    flat["tokens"][index] = np.concatenate(texts) if len(texts) else []
    flat["segment_ids"][index] = np.repeat(segment + 1, lengths)
    flat["positions"][index] = position
    flat["pool_mask"] = np.zeros(shape[0] * shape[1], bool)
    flat["pool_mask"][index] = position >= np.repeat(np.asarray(pool_start), lengths)
    return {name: array.reshape(shape) for name, array in flat.items()}


def locate_tokens(lengths: np.ndarray, row: np.ndarray, segment: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the tokens of texts lie in rows that are joined end to end, and their positions in their own texts.

    Args:
        lengths: Tokens of each text.
        row: Row of each text.
        segment: Index of each text in its row, from 0.
        row_length: Tokens of a row.

    Returns:
        Two arrays int64 [sum of lengths], text by text.
    """
    # Find where each text starts in its row: after all texts of that row with a smaller segment.
    order = np.lexsort((segment, row))
    sorted_row, sorted_length = row[order], lengths[order]
    sorted_start = np.cumsum(sorted_length) - sorted_length  # as if all rows were one
    first_of_row = np.searchsorted(sorted_row, sorted_row)
    start = np.empty_like(lengths)
    start[order] = sorted_start - sorted_start[first_of_row]
    # Number the tokens of each text.
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(row * row_length + start, lengths) + position, position
