"""The terms of BM25: words of identifiers and of texts, and pairs of characters where no spaces separate words."""

import unicodedata

import pytest

from jaxembed.search.terms import make_term_splitter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snake_case", "snak cas"),
        ("__camelCase", "camel cas"),
        ("parseHTTPHeader_v2", "pars http header v 2"),
        ("HTTP", "http"),
        ("nDCG10", "n dcg 10"),
        ("Größe.naïve", "größ naïv"),
        ("the Reading of files", "read fil"),
        ("हिन्दी में लिखो", "हिन्दी में लिखो"),  # vowel signs are inside of words
        ("ﬁle　ＡＢＣ１２", "fil abc 12"),  # ligature, full-width letters and digits
        ("我爱北京", "我爱 爱北 北京"),
        ("我", "我"),
        ("用JSON解析file_path。好", "用 json 解析 fil path 好"),
        ("データベースを", "デー ータ タベ ベー ース スを"),
        ("東京へ行く", "東京 京へ へ行 行く"),
        ("학교에서 배웠다", "학교 교에 에서 배웠 웠다"),
        ("ทำงาน", "ทำ าง งา าน"),
        ("ភាសាខ្មែរ", "ភាសា សាខ្មែ ខ្មែរ"),  # a character carries its signs
        ("", ""),
        ("…!?", ""),
    ],
)
def test_terms_of_a_text(text: str, expected: str) -> None:
    assert make_term_splitter()(text) == unicodedata.normalize("NFKC", expected).split()


@pytest.mark.parametrize("text", ["ガイド", "학교", "é", "ทำ"])
def test_encodings_of_a_text_have_equal_terms(text: str) -> None:
    list_terms = make_term_splitter()
    assert list_terms(unicodedata.normalize("NFD", text)) == list_terms(unicodedata.normalize("NFC", text)) != []
