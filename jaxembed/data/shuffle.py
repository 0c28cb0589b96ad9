"""Permutations by a key that take no memory: where each of some places goes is computed when it is asked for."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np

ROUNDS = 4
SMALL = 4096  # up to that many items are shuffled by a drawn permutation


def key_of(*parts: int | str) -> bytes:
    """A key that depends on all parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8 * ROUNDS).digest()


def permuted(places: np.ndarray, count: int, key: bytes) -> np.ndarray:
    """Where a permutation of `count` items (below 2^32), drawn by `key`, takes each of `places`: int64.

    The generalised Feistel network of Black and Rogaway (2002), over the least rectangle that holds all items, walked until
    it ends at one of them.
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


def _feistel(x: np.ndarray, count: int, key: bytes) -> np.ndarray:
    """A permutation of the rectangle's cells: column and row are moved in turn, by a hash of the other."""
    width = math.isqrt(count - 1) + 1
    sides = [np.uint32(width), np.uint32(-(-count // width))]
    row, column = np.divmod(x, sides[0])
    place = [column, row]
    for i, (factor, term) in enumerate(np.frombuffer(key, np.uint32).reshape(ROUNDS, 2)):
        moved, by = place[i % 2], place[1 - i % 2] * (factor | np.uint32(1))
        by ^= by >> np.uint32(15)
        by *= term | np.uint32(1)
        by >>= np.uint32(16)
        by *= sides[i % 2]
        by >>= np.uint32(16)  # below the side
        moved += by
        np.minimum(moved, moved - sides[i % 2], out=moved)  # modulo the side: what is less than zero wraps to more
    return place[1] * sides[0] + place[0]
