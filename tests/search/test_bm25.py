"""The BM25 baseline."""

import sys

import pytest

from jaxembed.errors import UserError
from jaxembed.search.bm25 import Bm25Similarity, rank_documents

CORPUS = ["", "def read_file(path): ...", "def writeJSON(value): ...", "class HTTPServer: ..."]


def test_words_inside_identifiers_match_in_any_form() -> None:
    best = rank_documents(CORPUS, ["Reading the files", "json writer", "a server"], 2)
    assert best.shape == (3, 2) and best.dtype == "int64"
    assert best[:, 0].tolist() == [1, 2, 3]


def test_rare_word_outweighs_common_one_and_stop_words_are_ignored() -> None:
    corpus = ["the file of the file", "file alpha", "file beta", "the of and with"]
    assert rank_documents(corpus, ["the file and the beta"], 1).tolist() == [[2]]
    assert rank_documents(corpus, ["alpha of the with"], 1).tolist() == [[1]]


def test_words_inside_clauses_without_spaces_match() -> None:
    corpus = ["昨天的股市大幅上涨。", "科学家发现了新的行星。", "今日の天気は晴れです。", "วันนี้อากาศดีมาก"]
    queries = ["发现行星的科学家是谁?", "股市为什么上涨", "天気予報", "อากาศ"]
    assert rank_documents(corpus, queries, 1)[:, 0].tolist() == [1, 0, 2, 3]


def test_query_without_known_words_and_k_beyond_the_corpus() -> None:
    best = rank_documents(CORPUS, ["", "unheard"], 10)
    assert [sorted(row) for row in best.tolist()] == [[0, 1, 2, 3]] * 2
    assert rank_documents(["the", ""], ["file"], 10).tolist() == [[0, 1]], "no document has a term"


def test_missing_library_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install '\.\[eval\]'"):
        rank_documents(CORPUS, ["file"], 1)


def test_similarity_is_symmetric_and_1_for_equal_terms() -> None:
    corpus = ["the red planet mars", "a long report about mars and many other planets of the sun, written in 1990", "violin"]
    similarity = Bm25Similarity(corpus)
    assert similarity.find_most_similar("Mars, the RED planets!") == (0, pytest.approx(1.0))
    index, score = similarity.find_most_similar("mars")  # all its terms are in both documents
    assert index == 0 and 0.1 < score < 0.6
    longer = similarity.find_most_similar(f"{corpus[0]} and a great deal of text about gardens, rivers, budgets and engines")
    assert longer[0] == 0 and longer[1] < 0.6
    assert similarity.find_most_similar("nothing known") == (-1, 0.0)
    assert Bm25Similarity(["the of"]).find_most_similar("the of") == (-1, 0.0)
