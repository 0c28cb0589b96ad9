"""Overlap of two collections: texts of one that occur in the other, as a whole or in part.

Evaluation texts are indexed, and training texts are matched one after another. Memory depends only on the evaluation texts.
The rules:

- **exact**: both texts are equal (`jaxembed.data.equality`).
- **n-gram**: both texts share N consecutive words, 13 by default, as in the decontamination of GPT-3 (Brown et al. 2020,
  appendix C). Words are runs of letters and digits of the texts' normalized forms. A character of a script without spaces
  counts as a word. A text with fewer than N words has no n-gram, so it matches exactly or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from jaxembed.curation.ngrams import UNSPACED_CHARS, hash_runs
from jaxembed.data.equality import hash_exact_text, hash_text, normalize_text

DEFAULT_NGRAM_WORDS = 13
TEXTS_PER_HASHING = 4096  # evaluation texts that are hashed together
NGRAM_WORD = re.compile(f"[{UNSPACED_CHARS}]|(?:(?![{UNSPACED_CHARS}_])\\w)+")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """An indexed text that a text overlaps with.

    Attributes:
        index: Number of the indexed text, in the order in which texts were added.
        rule: exact or ngram.
        words: The first n-gram that both share; empty for an exact match.
    """

    index: int
    rule: str
    words: str = ""


class OverlapIndex:
    """An index of texts, to find those that another text overlaps with."""

    def __init__(self, ngram_words: int = DEFAULT_NGRAM_WORDS):
        """Create an empty index.

        Args:
            ngram_words: Number of words of an n-gram.
        """
        self.ngram_words = ngram_words
        self.num_texts = 0
        self._text_numbers: dict[bytes, list[int]] = {}  # hash of a text -> numbers of the texts that have it
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # hashes of n-grams, numbers of the texts that contain them
        self._ngrams, self._ngram_texts = np.empty(0, np.uint64), np.empty(0, np.int32)

    def add(self, texts: Iterable[str]) -> None:
        """Add texts. They are numbered in the order in which they are added."""
        iterator = iter(texts)
        while batch := list(islice(iterator, TEXTS_PER_HASHING)):
            hashes, numbers = [], []
            for number, text in enumerate(batch, self.num_texts):
                self._text_numbers.setdefault(hash_text(text).tobytes(), []).append(number)
                ngrams = np.unique(hash_ngrams(split_words(text), self.ngram_words))
                hashes.append(ngrams)
                numbers.append(np.full(len(ngrams), number, np.int32))
            self._parts.append((np.concatenate(hashes), np.concatenate(numbers)))
            self.num_texts += len(batch)

    def find(self, text: str) -> list[Overlap]:
        """Return the indexed texts that a text overlaps with, each once. An exact match takes precedence."""
        self._sort()
        equal = self._text_numbers.get(hash_text(text).tobytes(), [])
        return [*(Overlap(number, "exact") for number in equal), *self._find_ngrams(text, set(equal))]

    def _find_ngrams(self, text: str, found: set[int]) -> Iterator[Overlap]:
        """Yield the texts that share an n-gram with a text and are not in `found`, and add them to it."""
        words = split_words(text)
        hashes = hash_ngrams(words, self.ngram_words)
        first, last = (np.searchsorted(self._ngrams, hashes, side) for side in ("left", "right"))
        for start in np.flatnonzero(first < last):
            for number in self._ngram_texts[first[start] : last[start]].tolist():
                if number not in found:
                    found.add(number)
                    yield Overlap(number, "ngram", " ".join(words[start : start + self.ngram_words]))

    def _sort(self) -> None:
        """Merge the n-grams of texts that were added since the last call."""
        if self._parts:
            parts = zip((self._ngrams, self._ngram_texts), *self._parts, strict=True)
            hashes, numbers = (np.concatenate(arrays) for arrays in parts)
            order = np.argsort(hashes, kind="stable")
            self._ngrams, self._ngram_texts, self._parts = hashes[order], numbers[order], []


def split_words(text: str) -> list[str]:
    """Return the words of a text's normalized form."""
    return NGRAM_WORD.findall(
        unicodedata.normalize("NFC", normalize_text(text))
    )  # NFC joins combining marks with their letters


def hash_ngrams(words: Sequence[str], size: int) -> np.ndarray:
    """Return the 64-bit hash of every run of `size` words, uint64 [max(len(words) - size + 1, 0)]."""
    return hash_runs(np.fromiter(map(hash_word, words), np.uint64, len(words)), size)


@functools.lru_cache(2**18)
def hash_word(word: str) -> int:
    """Return the 64-bit hash of a word. It is the same in all processes, unlike Python's `hash`."""
    return int(hash_exact_text(word).view("<u8")[0])
