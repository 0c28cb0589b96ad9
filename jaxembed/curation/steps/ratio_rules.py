"""Published rules for web documents, with the values that datatrove ships. They are written for languages with spaces.

| rules | source | requirements of a document |
|---|---|---|
| gopher | Rae et al. 2021, arXiv:2112.11446, A.1 | 50 to 100,000 words, 3 to 10 characters on average, few symbols |
| gopher_repetition | the same, table A1 | few repeated lines, paragraphs and n-grams |
| c4 | Raffel et al. 2020, arXiv:1910.10683, 2.2 | 5 sentences in lines that end like sentences; no curly brackets |
| fineweb | Penedo et al. 2024, arXiv:2406.17557, 3.6 | lines that end like sentences, few short and few repeated lines |

Words are runs of letters and digits, or single marks; datatrove takes them from NLTK. C4 removes lines and judges the rest;
here a text is judged by the lines that C4 would keep, but is not changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

GOPHER_WORDS, GOPHER_WORD_CHARS = (50, 100_000), (3, 10)
GOPHER_MAX_SYMBOLS_PER_WORD, GOPHER_MAX_BULLET_LINES, GOPHER_MAX_ELLIPSIS_LINES = 0.1, 0.9, 0.3
GOPHER_MIN_ALPHABETIC_WORDS, GOPHER_MIN_STOP_WORDS = 0.8, 2
GOPHER_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
GOPHER_MAX_REPEATED_PARTS, GOPHER_MAX_REPEATED_CHARS = 0.3, 0.2  # of lines and of paragraphs
GOPHER_MAX_TOP_NGRAM = {2: 0.2, 3: 0.18, 4: 0.16}  # n -> share of the characters
GOPHER_MAX_REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
C4_MIN_SENTENCES, C4_MIN_LINE_WORDS, C4_MAX_WORD_CHARS = 5, 3, 1000
C4_SENTENCE_ENDS = (".", "?", "!", '"', "'")
C4_POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
FINEWEB_MIN_SENTENCE_LINES, FINEWEB_MAX_SHORT_LINES, FINEWEB_SHORT_LINE_CHARS = 0.12, 0.67, 30
FINEWEB_MAX_REPEATED_CHARS, FINEWEB_MAX_BREAKS_PER_WORD = 0.01, 0.3

WORD_OR_SIGN = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)]*(?=\s|$)")
ELLIPSES = ("...", "…")


def find_gopher_problem(text: str) -> str | None:
    """Return why a text fails Gopher's quality rules, or None."""
    tokens = WORD_OR_SIGN.findall(text)
    words = [token for token in tokens if token[0].isalnum() or token[0] == "_"]
    if not GOPHER_WORDS[0] <= len(words) <= GOPHER_WORDS[1]:
        return "gopher: number of words"
    if not GOPHER_WORD_CHARS[0] <= sum(map(len, words)) / len(words) <= GOPHER_WORD_CHARS[1]:
        return "gopher: word length"
    num_symbols = max(text.count("#"), sum(map(text.count, ELLIPSES)))
    if num_symbols / len(words) > GOPHER_MAX_SYMBOLS_PER_WORD:
        return "gopher: symbols"
    lines = text.splitlines()
    if sum(line.lstrip().startswith("•") for line in lines) / len(lines) > GOPHER_MAX_BULLET_LINES:
        return "gopher: bullet points"
    if sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines) > GOPHER_MAX_ELLIPSIS_LINES:
        return "gopher: lines that end in an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in tokens) / len(words) < GOPHER_MIN_ALPHABETIC_WORDS:
        return "gopher: words without letters"
    has_stop_words = len(GOPHER_STOP_WORDS.intersection(words)) >= GOPHER_MIN_STOP_WORDS
    return None if has_stop_words else "gopher: stop words"


def find_repetition_problem(text: str) -> str | None:
    """Return why a text fails Gopher's repetition rules, or None."""
    for kind, breaks in (("paragraphs", r"\n{2,}"), ("lines", r"\n+")):
        parts = re.split(breaks, text.strip())
        count, chars = count_repeated(parts)
        if count / len(parts) > GOPHER_MAX_REPEATED_PARTS or chars / len(text) > GOPHER_MAX_REPEATED_CHARS:
            return f"gopher_repetition: {kind}"
    words = WORD_OR_SIGN.findall(text)
    for n, max_share in GOPHER_MAX_TOP_NGRAM.items():
        ngram, count = next(iter(Counter(list_ngrams(words, n)).most_common(1)), ("", 0))
        # An n-gram that occurs once is not a repetition, however short the text.
        if count > 1 and len(ngram) * count / len(text) > max_share:
            return f"gopher_repetition: most frequent {n}-gram"
    for n, max_share in GOPHER_MAX_REPEATED_NGRAMS.items():
        if count_repeated_ngram_chars(words, n) / len(text) > max_share:
            return f"gopher_repetition: repeated {n}-grams"
    return None


def find_c4_problem(text: str) -> str | None:
    """Return why a text fails C4's rules, or None."""
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        return "c4: lorem ipsum"
    if "{" in text:
        return "c4: curly bracket"
    lines = [line for line in map(str.strip, text.splitlines()) if _is_c4_line(line)]
    num_sentences = sum(max(len(SENTENCE_END.findall(line)), 1) for line in lines)
    return None if num_sentences >= C4_MIN_SENTENCES else "c4: number of sentences"


def _is_c4_line(line: str) -> bool:
    """Return whether C4 keeps a line."""
    words, lowered = line.split(), line.lower()
    return (
        line.endswith(C4_SENTENCE_ENDS)
        and not line.endswith("...")
        and len(words) >= C4_MIN_LINE_WORDS
        and max(map(len, words)) <= C4_MAX_WORD_CHARS
        and "javascript" not in lowered
        and not any(phrase in lowered for phrase in C4_POLICY_PHRASES)
    )


def find_fineweb_problem(text: str) -> str | None:
    """Return why a text fails FineWeb's rules, or None."""
    lines = [line for line in text.split("\n") if line.strip()] or [text]
    if sum(line.endswith(C4_SENTENCE_ENDS) for line in lines) / len(lines) <= FINEWEB_MIN_SENTENCE_LINES:
        return "fineweb: lines that end like sentences"
    if sum(len(line) <= FINEWEB_SHORT_LINE_CHARS for line in lines) / len(lines) >= FINEWEB_MAX_SHORT_LINES:
        return "fineweb: short lines"
    _, chars = count_repeated(lines)
    if chars / max(len(text.replace("\n", "")), 1) >= FINEWEB_MAX_REPEATED_CHARS:
        return "fineweb: repeated lines"
    has_many_breaks = text.count("\n") / max(len(WORD_OR_SIGN.findall(text)), 1) > FINEWEB_MAX_BREAKS_PER_WORD
    return "fineweb: line breaks" if has_many_breaks else None


def count_repeated(parts: Sequence[str]) -> tuple[int, int]:
    """Return the number of repeated parts (all occurrences but the first), and of their characters."""
    repeats = [(len(part), count - 1) for part, count in Counter(parts).items() if count > 1]
    return sum(count for _, count in repeats), sum(chars * count for chars, count in repeats)


def list_ngrams(words: Sequence[str], n: int) -> list[str]:
    """Return the n-grams of words, each as one text."""
    return [" ".join(run) for run in zip(*(islice(words, i, None) for i in range(n)), strict=False)]


def count_repeated_ngram_chars(words: Sequence[str], n: int) -> int:
    """Return the number of characters in repeated n-grams. Overlapping ones are counted once."""
    ngrams, seen, chars, i = list_ngrams(words, n), set[str](), 0, 0
    while i < len(ngrams):
        if ngrams[i] in seen:
            chars += sum(map(len, words[i : i + n]))
            i += n
        else:
            seen.add(ngrams[i])
            i += 1
    return chars


RATIO_RULES: dict[str, Callable[[str], str | None]] = {
    "gopher": find_gopher_problem, "gopher_repetition": find_repetition_problem, "c4": find_c4_problem,
    "fineweb": find_fineweb_problem,
}  # fmt: skip
