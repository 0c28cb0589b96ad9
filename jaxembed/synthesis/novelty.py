"""Detect exact and near copies of texts, and the language of a text, by the rules of curation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np

from jaxembed.config.curation import LanguageStepConfig
from jaxembed.curation.minhash import choose_hashes_per_band, compute_signatures, hash_bands, import_rensa
from jaxembed.curation.steps.languages import load_identifier, open_identifier
from jaxembed.curation.steps.near_duplicates import hash_char_ngrams
from jaxembed.data.equality import hash_exact_text, join_normalized
from jaxembed.errors import UserError

DEFAULT_THRESHOLD = 0.8
# Languages that the identifier cannot distinguish in a few sentences.
CLOSE_LANGUAGES = ({"no", "nb", "nn", "da"}, {"hr", "sr", "bs"}, {"id", "ms"}, {"cs", "sk"}, {"gl", "pt"}, {"af", "nl"})


class SeenTexts:
    """A set of texts without copies: equal texts (`data.equality`), or texts that share most character n-grams.

    A near copy has a Jaccard index of at least the threshold, as MinHash signatures estimate it (`curation.minhash`).
    """

    def __init__(self, match: Literal["exact", "near"], threshold: float = DEFAULT_THRESHOLD):
        """Start without texts. Raise `UserError` if rensa is needed and not installed."""
        self._hashes: set[bytes] = set()
        self._minhash = import_rensa() if match == "near" else None
        self._threshold, self._hashes_per_band = threshold, choose_hashes_per_band(threshold)
        self._signatures: list[np.ndarray] = []
        self._first_texts: dict[int, int] = {}  # bucket -> index of its first signature

    def add(self, *texts: str) -> bool:
        """Add a text, or several as one, and return True, or return False if a copy is in the set."""
        text, text_hash = "\n".join(texts), hash_exact_text(join_normalized(texts)).tobytes()
        if text_hash in self._hashes:
            return False
        if self._minhash is not None and text.strip() and not self._add_signature(text):
            return False
        self._hashes.add(text_hash)
        return True

    def _add_signature(self, text: str) -> bool:
        """Add the signature of a text and return True, or return False if a similar one is in the set.

        A text is compared only with the first text of each bucket, as in curation.
        """
        # Buckets (LSH bands) propose candidates; the estimated Jaccard index decides.
        signature = compute_signatures(hash_char_ngrams([text]), self._minhash)
        hashes = signature[0].astype(np.uint16)
        buckets = hash_bands(signature, self._hashes_per_band)[:, 0].tolist()
        candidates = {self._first_texts[bucket] for bucket in buckets if bucket in self._first_texts}
        if any((self._signatures[i] == hashes).mean() >= self._threshold for i in candidates):
            return False
        for bucket in buckets:
            self._first_texts.setdefault(bucket, len(self._signatures))
        self._signatures.append(hashes)
        return True


@functools.cache
def open_language_identifier() -> Callable[[str], str | None]:
    """Return a function that gives the ISO 639-1 code of a text's language, or None if it is not certain."""
    return open_identifier(LanguageStepConfig(pairs="same"))


@functools.cache
def find_language_code(name: str) -> str | None:
    """Return the ISO 639-1 code of a language with an English name or a code; None if it has none.

    Raises:
        UserError: babel is not installed.
    """
    try:
        from babel import Locale
    except ImportError:
        raise UserError("synthesize: languages need babel, which is not installed. Run pip install '.[synthesize]'.") from None
    codes = {english.casefold(): code for code, english in Locale("en").languages.items()}
    lowered = name.strip().casefold()
    code = codes.get(lowered, lowered if lowered in codes.values() else "")
    return code if len(code) == 2 else None


def find_language_problem(text: str, expected: str) -> str | None:
    """Return why a text is not in an expected language; None if it is, or if the language of either is not certain."""
    code = find_language_code(expected)
    if code not in load_identifier()[1] or not (language := open_language_identifier()(text)):
        return None
    is_close = any({code, language} <= group for group in CLOSE_LANGUAGES)
    return None if code == language or is_close else f"in {language}"
