"""Hashes of n-grams, and the scripts that have no spaces between words."""

from __future__ import annotations

import numpy as np

# For regular expressions: Thai, Lao, Myanmar, Khmer, Hiragana, Katakana, and Han.
UNSPACED_CHARS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio


def hash_runs(values: np.ndarray, size: int) -> np.ndarray:
    """Return a hash of every run of `size` values.

    Args:
        values: The values, or their hashes, uint64 [N].
        size: Number of values in a run.

    Returns:
        The hashes, uint64 [max(N - size + 1, 0)]. Their bits are not well distributed.
    """
    hashes = np.zeros(max(len(values) - size + 1, 0), np.uint64)
    for offset in range(size if len(hashes) else 0):
        hashes = (hashes * HASH_FACTOR) ^ values[offset : offset + len(hashes)]
    return hashes


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Return well-distributed 64-bit hashes of 64-bit values (SplitMix64; Steele, Lea and Flood 2014)."""
    values = (values + HASH_FACTOR) & np.uint64(0xFFFFFFFFFFFFFFFF)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
