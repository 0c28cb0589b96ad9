"""The rule that decides whether two texts are equal, for masking, duplicates, statistics and mining."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np

# Characters without width or meaning: soft hyphen, zero-width spaces and joiners, marks of the text direction,
# variation selectors, and the byte order mark.
INVISIBLE_CHARS = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]")

ASCII_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f"  # besides the space
START_CHARS = 32  # characters that are compared before whole texts are


def normalize_text(text: str) -> str:
    """Return a form of a text that all equal texts share.

    Texts are equal if they differ only in these ways:

    - letter case,
    - the encoding of letters with marks (NFC or NFD),
    - white space: runs, line breaks, non-breaking spaces, and white space at either end,
    - invisible characters.

    This is canonical caseless matching (Unicode, definition D145) with white space collapsed. Compatibility forms, such as
    ² and 2, stay different (no NFKC), because they can change what a text means.
    """
    if text.isascii():
        folded = text.lower().strip()
        is_collapsed = "  " not in folded and not any(space in folded for space in ASCII_SPACES)
        return folded if is_collapsed else " ".join(folded.split())
    folded = unicodedata.normalize("NFD", INVISIBLE_CHARS.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFD", folded).split())


def join_normalized(texts: Iterable[str]) -> str:
    """Return a form of several texts that all equal ones share. A line break separates them: normalized texts have none."""
    return "\n".join(map(normalize_text, texts))


def hash_text(text: str) -> np.ndarray:
    """Return a 64-bit hash of a text, as uint32 [2]. Equal texts (`normalize_text`) have equal hashes.

    Texts of a global batch are compared by their hashes.
    """
    return hash_exact_text(normalize_text(text))


def hash_exact_text(text: str) -> np.ndarray:
    """Return the 64-bit BLAKE2b hash of the bytes of a text, as uint32 [2]."""
    return np.frombuffer(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), np.uint32)


def exclude_equal(texts: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the texts that equal none of `others`, each once, in order."""
    texts, others = list(texts), list(others)
    if not texts:
        return []
    # Most texts differ at their start. Only texts with equal starts are normalized completely.
    starts = [_normalize_start(text) for text in (*others, *texts)]
    counts = Counter(starts)
    seen = {normalize_text(text) for text, start in zip(others, starts, strict=False) if counts[start] > 1}
    distinct_texts = []
    for text, start in zip(texts, starts[len(others) :], strict=True):
        if counts[start] == 1:
            distinct_texts.append(text)
        elif (normalized := normalize_text(text)) not in seen:
            seen.add(normalized)
            distinct_texts.append(text)
    return distinct_texts


def _normalize_start(text: str) -> str:
    """Return the first `START_CHARS` characters of the normalized form of a text, from its first characters if possible."""
    start = normalize_text(text[: 4 * START_CHARS])
    # What follows can only change the marks of the last letter: another letter must follow those that are returned.
    is_settled = any(not unicodedata.combining(char) for char in start[START_CHARS:])
    return (start if is_settled else normalize_text(text))[:START_CHARS]
