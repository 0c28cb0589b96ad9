"""When two texts are equal: one rule for masking, duplicates, statistics and mining."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

# Characters without width or meaning of their own: soft hyphen, zero-width spaces and joiners, marks of the text direction,
# variation selectors, and the byte order mark.
INVISIBLE_CHARS = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]")


def normalize_text(text: str) -> str:
    """Return a form of a text that all equal texts share.

    Texts are equal if they differ only in letter case, in how letters with marks are encoded (NFC or NFD), in white space
    (runs, line breaks, non-breaking spaces, either end), or in invisible characters. This is canonical caseless matching
    (Unicode, definition D145) with white space collapsed. Compatibility forms, such as ² and 2, stay different (no NFKC):
    they can change what a text means.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFD", INVISIBLE_CHARS.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFD", folded).split())


def hash_text(text: str) -> np.ndarray:
    """Return a 64-bit hash of a text, as uint32 [2]. Equal texts (`normalize_text`) have equal hashes.

    Texts are compared by it across a global batch.
    """
    return hash_exact_text(normalize_text(text))


def hash_exact_text(text: str) -> np.ndarray:
    """Return the 64-bit BLAKE2b hash of the bytes of a text, as uint32 [2]."""
    return np.frombuffer(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), np.uint32)


def exclude_equal(texts: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the texts that equal none of `others`, each once, in order."""
    seen = set(map(normalize_text, others))
    kept = []
    for text in texts:
        if (normalized := normalize_text(text)) not in seen:
            seen.add(normalized)
            kept.append(text)
    return kept
