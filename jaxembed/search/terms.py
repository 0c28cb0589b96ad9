"""Split texts into the terms of BM25: words, or character bigrams in scripts without spaces between words."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from jaxembed.data.bpe import WORD_PATTERN

# Scripts that do not separate words by spaces, and Hangul, whose words carry their particles.
BIGRAM_SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Hangul", "Thai", "Lao", "Khmer", "Myanmar")
WORD_ENDING = r"(?<=\w{3})(ing|ed|es|s|e)$"


def make_term_splitter() -> Callable[[str], list[str]]:
    """Return a function that lists the terms of a text. Needs bm25s and regex.

    - Words are written in lower case. Identifiers are split at underscores, case changes and digits; English stop words and
      endings are removed.
    - Texts in `BIGRAM_SCRIPTS` give every pair of neighboring characters, as Lucene's CJKBigramFilter does. A character is
      what a reader sees as one: a letter with its vowel signs and marks. A character without neighbors is a separate term.
    - Equivalent characters, such as full-width letters and digits, are equal (Unicode NFKC).
    """
    import unicodedata

    import regex  # unlike re, its \w holds the marks inside words of Indic and other scripts
    from bm25s.stopwords import STOPWORDS_EN

    stop_words = set(STOPWORDS_EN)
    word, ending, character = regex.compile(WORD_PATTERN), regex.compile(WORD_ENDING), regex.compile(r"\X")
    scripts = "".join(rf"\p{{Script={script}}}" for script in BIGRAM_SCRIPTS)
    unspaced_run = regex.compile(rf"([{scripts}][{scripts}\p{{M}}ー]*)")

    def list_words(text: str) -> list[str]:
        words = (match.lower() for match in word.findall(text))
        return [ending.sub("", match) for match in words if match not in stop_words]

    def list_bigrams(run: str) -> list[str]:
        characters = character.findall(run)
        return ["".join(pair) for pair in pairwise(characters)] or characters

    def list_terms(text: str) -> list[str]:
        parts = unspaced_run.split(unicodedata.normalize("NFKC", text))  # words and runs alternate
        return [term for i, part in enumerate(parts) for term in (list_bigrams(part) if i % 2 else list_words(part))]

    return list_terms
