"""MinHash signatures, and locality-sensitive hashing of their bands to find similar sets.

Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3. rensa computes the signatures.

1. The signature of a set has `NUM_HASHES` values. The share of equal values in two signatures estimates the Jaccard index.
2. Signatures are split into bands. Sets with an equal band share a bucket and are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.curation.ngrams import mix_bits
from jaxembed.errors import UserError

NUM_HASHES = 128  # the standard deviation of the estimate is at most 0.044
HASH_SEED = 1
MIN_RECALL = 0.99  # of pairs whose Jaccard index equals the threshold; determines the number of hashes per band


def import_rensa() -> Any:
    """Return rensa's MinHash."""
    try:
        import rensa
    except ImportError:
        raise UserError("rensa: finds near copies, but is not installed. Run pip install rensa.") from None
    return rensa.RMinHash


def choose_hashes_per_band(threshold: float) -> int:
    """Return the largest number with which a pair at the threshold shares a bucket with a probability of `MIN_RECALL`."""
    sizes = range(1, NUM_HASHES + 1)
    return max(size for size in sizes if 1 - (1 - threshold**size) ** (NUM_HASHES // size) >= MIN_RECALL)


def compute_signatures(sets: Sequence[np.ndarray], minhash: Any) -> np.ndarray:
    """Return the MinHash signatures of sets of hashes, uint64 [n] each, as uint32 [N, NUM_HASHES]."""
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in sets])]).astype(np.uint64)
    matrix = minhash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, num_perm=NUM_HASHES, seed=HASH_SEED)
    values = itertools.chain.from_iterable(matrix.to_rows())
    return np.fromiter(values, np.uint32, len(sets) * NUM_HASHES).reshape(len(sets), NUM_HASHES)


def hash_bands(signatures: np.ndarray, hashes_per_band: int) -> np.ndarray:
    """Return the bucket of each band of each signature, uint64 [bands, N]. Different bands never share a bucket."""
    num_bands = NUM_HASHES // hashes_per_band
    buckets = np.repeat(np.arange(num_bands, dtype=np.uint64)[:, None], len(signatures), axis=1)
    for offset in range(hashes_per_band):
        columns = signatures[:, offset : offset + num_bands * hashes_per_band : hashes_per_band]
        buckets = mix_bits(buckets ^ columns.T.astype(np.uint64))
    return buckets
