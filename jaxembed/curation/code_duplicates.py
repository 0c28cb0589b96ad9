"""Near-duplicate code, detected by the token shingles that two texts share (`curation.minhash`)."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from zlib import crc32

import numpy as np

from jaxembed.curation.minhash import compute_signatures, hash_bands, import_rensa
from jaxembed.curation.ngrams import hash_runs, mix_bits

MIN_JACCARD = 0.7  # minimum Jaccard index of the token shingles of near duplicates
SHINGLE_TOKENS = 3
HASHES_PER_BAND = 4  # finds 99.98% of the pairs with a Jaccard index of 0.7, and more above


class NearDuplicateFilter:
    """A set of texts without near duplicates. MinHash bands propose candidates, the Jaccard index decides."""

    def __init__(self) -> None:
        """Create an empty set. Raise `UserError` if rensa is not installed."""
        self._minhash = import_rensa()
        self._buckets: dict[int, list[np.ndarray]] = defaultdict(list)

    def add(self, code: str) -> bool:
        """Add a text and return True, or return False if an equal or similar text is in the set."""
        shingles = hash_shingles(code)
        bands = hash_bands(compute_signatures([shingles], self._minhash), HASHES_PER_BAND)
        buckets = [self._buckets[key] for key in bands[:, 0].tolist()]
        candidates = {id(other): other for bucket in buckets for other in bucket}
        if any(_jaccard_index(shingles, other) >= MIN_JACCARD for other in candidates.values()):
            return False
        for bucket in buckets:
            bucket.append(shingles)
        return True


def hash_shingles(code: str) -> np.ndarray:
    """Return the distinct hashes of all runs of `SHINGLE_TOKENS` tokens, uint64 [N], sorted. Shorter code has one hash."""
    tokens = np.array([_hash_token(token) for token in re.findall(r"\w+|[^\w\s]", code)], np.uint64)
    return np.unique(mix_bits(hash_runs(tokens, min(SHINGLE_TOKENS, len(tokens)))))


@lru_cache(maxsize=1 << 16)
def _hash_token(token: str) -> int:
    return crc32(token.encode()) * 0x2545F491 + len(token)


def _jaccard_index(left: np.ndarray, right: np.ndarray) -> float:
    num_shared = np.intersect1d(left, right, assume_unique=True).size
    return num_shared / (left.size + right.size - num_shared)
