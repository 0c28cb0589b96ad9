"""Permutations by a key that take little memory: where each of some places goes is computed when it is asked for."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np

ROUNDS = 4
SMALL = 4096  # up to that many items are shuffled by a drawn permutation


def key_of(*parts: int | str) -> bytes:
    """A key that depends on all parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def permuted(places: np.ndarray, count: int, key: bytes) -> np.ndarray:
    """Where a permutation of `count` items (below 2^32), drawn by `key`, takes each of `places`: int64.

    The generalised Feistel network of Black and Rogaway (2002), over the least rectangle that holds all items, walked until
    it ends at one of them: column and row are moved in turn, by a drawn function of the other.
    """
    if count <= SMALL:
        return _drawn(count, key)[places]
    found = _feistel(places.astype(np.uint32), count, key)
    while (outside := np.flatnonzero(found >= count)).size:
        found[outside] = _feistel(found[outside], count, key)
    return found.astype(np.int64)


@functools.lru_cache(maxsize=256)
def _drawn(count: int, key: bytes) -> np.ndarray:
    return np.random.default_rng(np.frombuffer(key, np.uint32)).permutation(count)


def _sides(count: int) -> tuple[int, int]:
    """Columns and rows of the rectangle."""
    width = math.isqrt(count - 1) + 1
    return width, -(-count // width)


@functools.lru_cache(maxsize=64)
def _moves(count: int, key: bytes) -> list[np.ndarray]:
    """Of each round, how far one side is moved at each place of the other."""
    sides, random = _sides(count), np.random.default_rng(np.frombuffer(key, np.uint32))
    return [random.integers(sides[i % 2], size=sides[1 - i % 2], dtype=np.uint32) for i in range(ROUNDS)]


def _feistel(x: np.ndarray, count: int, key: bytes) -> np.ndarray:
    sides = [np.uint32(side) for side in _sides(count)]
    place = list(np.divmod(x, sides[0]))[::-1]  # column, row
    for i, moves in enumerate(_moves(count, key)):
        moved, side = place[i % 2], sides[i % 2]
        moved += moves[place[1 - i % 2]]
        np.minimum(moved, moved - side, out=moved)  # modulo the side: what is less than zero wraps to more
    return place[1] * sides[0] + place[0]
