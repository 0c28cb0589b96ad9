"""Near copies of code: told by the token shingles that two texts share."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from zlib import crc32

import numpy as np

SIMILAR = 0.7  # Jaccard index of token shingles from which two codes are copies
SHINGLE = 3  # tokens
BANDS, ROWS = 32, 4  # MinHash: finds 99.98% of the pairs at a Jaccard index of 0.7, and more above


class NearCopies:
    """A set of codes of which no two are near copies: MinHash bands find candidates, the Jaccard index decides."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._factors = random.integers(2**63, size=BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
        self._buckets: dict[bytes, list[np.ndarray]] = defaultdict(list)

    def add(self, code: str) -> bool:
        """Adds a code and returns True, or returns False because an equal or similar one is there."""
        shingles = _shingles(code)
        buckets = [self._buckets[band] for band in self._bands(shingles)]
        candidates = {id(other): other for bucket in buckets for other in bucket}
        if any(_jaccard(shingles, other) >= SIMILAR for other in candidates.values()):
            return False
        for bucket in buckets:
            bucket.append(shingles)
        return True

    def _bands(self, shingles: np.ndarray) -> list[bytes]:
        hashes = (shingles[:, None] * self._factors) >> np.uint64(32)
        bands = hashes.min(axis=0).astype(np.uint32).reshape(BANDS, ROWS)
        return [bytes([number]) + band.tobytes() for number, band in enumerate(bands)]


def _shingles(code: str) -> np.ndarray:
    """The distinct 64-bit hashes of the runs of SHINGLE tokens of a code, sorted."""
    tokens = np.array([_token_hash(token) for token in re.findall(r"\w+|[^\w\s]", code)], np.uint64)
    hashes = np.zeros(max(len(tokens) - SHINGLE + 1, 1), np.uint64)
    for offset in range(SHINGLE):
        hashes = (hashes * np.uint64(0x9E3779B97F4A7C15)) ^ tokens[offset : offset + len(hashes)]
    return np.unique(hashes ^ (hashes >> np.uint64(29)))


@lru_cache(maxsize=1 << 16)
def _token_hash(token: str) -> int:
    return crc32(token.encode()) * 0x2545F491 + len(token)


def _jaccard(left: np.ndarray, right: np.ndarray) -> float:
    common = np.intersect1d(left, right, assume_unique=True).size
    return common / (left.size + right.size - common)
