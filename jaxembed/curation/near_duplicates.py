"""Near-duplicate code, detected by the token shingles that two texts share (MinHash with locality-sensitive hashing)."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from zlib import crc32

import numpy as np

MIN_JACCARD = 0.7  # minimum Jaccard index of the token shingles of near duplicates
SHINGLE_TOKENS = 3
NUM_BANDS, HASHES_PER_BAND = 32, 4  # finds 99.98% of the pairs with a Jaccard index of 0.7, and more above


class NearDuplicateFilter:
    """A set of texts without near duplicates. MinHash bands propose candidates, the Jaccard index decides."""

    def __init__(self) -> None:
        """Create an empty set."""
        rng = np.random.default_rng(0)
        self._factors = rng.integers(2**63, size=NUM_BANDS * HASHES_PER_BAND, dtype=np.uint64) | np.uint64(1)
        self._buckets: dict[bytes, list[np.ndarray]] = defaultdict(list)

    def add(self, code: str) -> bool:
        """Add a text and return True, or return False if an equal or similar text is in the set."""
        shingles = _hash_shingles(code)
        buckets = [self._buckets[band] for band in self._compute_bands(shingles)]
        candidates = {id(other): other for bucket in buckets for other in bucket}
        if any(_jaccard_index(shingles, other) >= MIN_JACCARD for other in candidates.values()):
            return False
        for bucket in buckets:
            bucket.append(shingles)
        return True

    def _compute_bands(self, shingles: np.ndarray) -> list[bytes]:
        """Return the bucket keys of a text: the MinHash signature, cut into bands, each with its index."""
        hashes = (shingles[:, None] * self._factors) >> np.uint64(32)
        bands = hashes.min(axis=0).astype(np.uint32).reshape(NUM_BANDS, HASHES_PER_BAND)
        return [bytes([index]) + band.tobytes() for index, band in enumerate(bands)]


def _hash_shingles(code: str) -> np.ndarray:
    """Return the distinct 64-bit hashes of all runs of SHINGLE_TOKENS tokens, sorted."""
    tokens = np.array([_hash_token(token) for token in re.findall(r"\w+|[^\w\s]", code)], np.uint64)
    hashes = np.zeros(max(len(tokens) - SHINGLE_TOKENS + 1, 1), np.uint64)
    for offset in range(SHINGLE_TOKENS):
        hashes = (hashes * np.uint64(0x9E3779B97F4A7C15)) ^ tokens[offset : offset + len(hashes)]
    return np.unique(hashes ^ (hashes >> np.uint64(29)))


@lru_cache(maxsize=1 << 16)
def _hash_token(token: str) -> int:
    return crc32(token.encode()) * 0x2545F491 + len(token)


def _jaccard_index(left: np.ndarray, right: np.ndarray) -> float:
    num_shared = np.intersect1d(left, right, assume_unique=True).size
    return num_shared / (left.size + right.size - num_shared)
