"""Overlap of texts: equal texts, shared n-grams, and what counts as a word."""

from __future__ import annotations

import random

import pytest

from jaxembed.curation.overlap import Overlap, OverlapIndex, hash_word, split_words

SENTENCE = "The bank may ask for a passport, a driving license or another proof of identity before it opens an account."


def make_index(*texts: str, ngram_words: int = 13) -> OverlapIndex:
    index = OverlapIndex(ngram_words)
    index.add(texts)
    return index


def test_equal_texts_match_whatever_their_case_and_spaces() -> None:
    index = make_index("How do I open an account?", "Something else", "how do  i OPEN an account?")
    assert index.find(" how do I open an\taccount? ") == [Overlap(0, "exact"), Overlap(2, "exact")]
    assert index.find("how do I open an account") == [], "short texts match exactly or not at all"


def test_texts_that_share_a_run_of_words_match() -> None:
    index = make_index("unrelated", SENTENCE)
    quote = "It says: the bank MAY ask, for a passport a driving (license) or another proof; nothing more."
    assert index.find(quote) == [Overlap(1, "ngram", "the bank may ask for a passport a driving license or another proof")]
    assert index.find(quote.replace("another", "some")) == []
    assert make_index(SENTENCE, ngram_words=5).find("or another proof of identity") == [
        Overlap(0, "ngram", "or another proof of identity")
    ]


def test_an_exact_match_is_not_counted_again() -> None:
    index = make_index(SENTENCE, f"{SENTENCE} Really.")
    assert [(match.index, match.rule) for match in index.find(SENTENCE.upper())] == [(0, "exact"), (1, "ngram")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's naïve, Café_2!", ["it", "s", "naïve", "café", "2"]),
        ("数学の本abc", ["数", "学", "の", "本", "abc"]),
        ("пробный текст", ["пробный", "текст"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_scripts_without_spaces_match_by_character() -> None:
    index = make_index("机器学习是人工智能的一个重要分支领域")
    assert [match.rule for match in index.find("众所周知,机器学习是人工智能的一个重要分支。")] == ["ngram"]
    assert index.find("机器学习是一门课程") == []


def test_matches_equal_those_of_a_comparison_of_all_runs() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd", k=rng.randrange(12))) for _ in range(150)]
    index = OverlapIndex(4)
    index.add(texts[:60])
    index.add(texts[60:100])
    runs = [{tuple(words[i : i + 4]) for i in range(len(words) - 3)} for words in map(str.split, texts)]
    for text, own in zip(texts[100:], runs[100:], strict=True):
        expected = {i: "exact" if texts[i] == text else "ngram" for i in range(100) if texts[i] == text or own & runs[i]}
        assert {match.index: match.rule for match in index.find(text)} == expected


def test_an_empty_index_finds_nothing() -> None:
    assert OverlapIndex().find(SENTENCE) == []


def test_the_hash_of_a_word_is_the_same_in_all_processes() -> None:
    assert hash_word("bank") == 11629350947798869288
