"""Keyed permutations in little memory: each index is permuted on demand."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np

FEISTEL_ROUNDS = 4
MAX_STORED_PERMUTATION = 4096  # up to this many items are permuted by a stored permutation


def make_key(*parts: int | str) -> bytes:
    """Return a 16-byte key that depends on all parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def permute_indices(indices: np.ndarray, count: int, key: bytes) -> np.ndarray:
    """Return the images of indices under a pseudorandom permutation of `count` items.

    The permutation is the generalized Feistel network of Black and Rogaway ("Ciphers with Arbitrary Finite Domains", 2002)
    over the smallest near-square rectangle that has a cell for every item. A result outside the items is permuted again
    until it is one of them (cycle walking).

    Args:
        indices: Integers below `count`, [N].
        count: The number of items, below 2^32.
        key: Selects the permutation (`make_key`).

    Returns:
        The permuted indices, int64 [N].
    """
    if count <= MAX_STORED_PERMUTATION:
        return _draw_permutation(count, key)[indices]
    permuted = _apply_feistel(indices.astype(np.uint32), count, key)
    while (outside := np.flatnonzero(permuted >= count)).size:
        permuted[outside] = _apply_feistel(permuted[outside], count, key)
    return permuted.astype(np.int64)


@functools.lru_cache(maxsize=256)
def _draw_permutation(count: int, key: bytes) -> np.ndarray:
    return np.random.default_rng(np.frombuffer(key, np.uint32)).permutation(count)


def _compute_rectangle_sides(count: int) -> tuple[int, int]:
    """Return the columns and rows of the rectangle."""
    columns = math.isqrt(count - 1) + 1
    return columns, -(-count // columns)


@functools.lru_cache(maxsize=64)
def _draw_round_shifts(count: int, key: bytes) -> list[np.ndarray]:
    """Draw the round functions: for each round, the shift of one coordinate at each value of the other."""
    sides, rng = _compute_rectangle_sides(count), np.random.default_rng(np.frombuffer(key, np.uint32))
    return [rng.integers(sides[i % 2], size=sides[1 - i % 2], dtype=np.uint32) for i in range(FEISTEL_ROUNDS)]


def _apply_feistel(cells: np.ndarray, count: int, key: bytes) -> np.ndarray:
    """Permute the cells of the rectangle once. Cells are numbered row by row."""
    sides = [np.uint32(side) for side in _compute_rectangle_sides(count)]
    rows, columns = np.divmod(cells, sides[0])
    coordinates = [columns, rows]
    for i, shifts in enumerate(_draw_round_shifts(count, key)):
        # Columns move by a function of the row in even rounds, rows by a function of the column in odd ones.
        shifted, side = coordinates[i % 2], sides[i % 2]
        shifted += shifts[coordinates[1 - i % 2]]
        # The sum modulo the side: below it, the unsigned difference wraps around to a larger number.
        np.minimum(shifted, shifted - side, out=shifted)
    return coordinates[1] * sides[0] + coordinates[0]
