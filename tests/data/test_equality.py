"""Equal texts: one rule, and everything that follows it."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.sources import draw_examples, open_source_file, write_jsonl
from jaxembed.config import DataConfig
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.equality import exclude_equal, hash_exact_text, hash_text, normalize_text
from jaxembed.data.reports import compute_stats
from jaxembed.data.sources import open_sources

EQUAL_TO_CAFE = [
    "Un café\n", " un  café", "UN CAFÉ", "un cafe\u0301", "un\u00a0café", "un\u3000café\u2028", "\ufeffun ca\u200bfé",
    "u\u00adn café", "un\r\n\tcafé", "un café\u200d",
]  # fmt: skip


@pytest.mark.parametrize("text", EQUAL_TO_CAFE)
def test_equal_texts_have_one_form_and_one_hash(text: str) -> None:
    assert normalize_text(text) == normalize_text("un café")
    assert np.array_equal(hash_text(text), hash_text("un café"))
    assert not np.array_equal(hash_exact_text(text), hash_exact_text("un café"))


def test_other_texts_stay_different() -> None:
    texts = ["", "a", "b", "ab", "a b", "é", "x2", "x²", "un cafe", "\uff45", "a-b", "a.b", "a?", "1", "①"]
    assert len({tuple(hash_text(text)) for text in texts}) == len(texts)
    assert hash_text("a").dtype == np.uint32 and hash_text("a").shape == (2,)
    assert hash_text("").any()  # zeros mean that a text is absent


@given(st.text())
@example("\u0345a\u0301")
@example("ß\u1e9e İ\ud83d")
def test_normalization_is_idempotent_and_ignores_encoding_and_white_space(text: str) -> None:
    form = normalize_text(text)
    assert normalize_text(form) == form
    for other in (f" {text}\n", *(unicodedata.normalize(kind, text) for kind in ("NFC", "NFD")), text.casefold()):
        assert normalize_text(other) == form


def test_excluded_texts_and_repeated_ones_are_left_out() -> None:
    assert exclude_equal(["a", "A ", "b", "c\u00a0d", "C D"], ["B"]) == ["a", "c\u00a0d"]


@given(
    st.lists(st.text("aA \n\u00a0\u200be\u0301é\u0327", max_size=200), max_size=6),
    st.lists(st.text("aA ", max_size=6), max_size=2),
)
@example(["x" * 500 + "a", "x" * 500 + "A", " " * 300 + "b", "b"], [])
@example(["e" + "\u0301\u0327" * 100, "e" + "\u0327\u0301" * 100], [])
def test_excluding_equal_texts_compares_whole_texts(texts: list[str], others: list[str]) -> None:
    seen = set(map(normalize_text, others))
    expected = []
    for text in texts:
        if normalize_text(text) not in seen:
            expected.append(text)
            seen.add(normalize_text(text))
    assert exclude_equal(texts, others) == expected


def test_a_negative_that_equals_the_query_or_a_positive_is_dropped_and_counted(tmp_path: Path) -> None:
    row = {"query": "the query", "pos": ["first", "second\n"], "neg": ["The query", "first ", "Second", "third", "third\u200b"]}
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", [row, {"query": "q", "pos": ["p"]}]))
    assert {text for drawn in draw_examples(source, 0, 5) for text in drawn.negatives} == {"third"}
    assert source.sampler.drop_counts == {"negatives equal to the query, to a positive or to each other": 4}


def test_a_label_is_not_its_own_negative_in_another_case(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": ["Sport", "sport", "science"][i % 3]} for i in range(6)]
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), label_documents="labels")
    assert {text for drawn in draw_examples(source, 0, 2) for text in drawn.negatives} == {"science"}


def test_equal_queries_are_not_few_shot_examples_of_each_other(tmp_path: Path) -> None:
    rows = [{"query": "Who?", "pos": ["a"]}, {"query": "who?\u00a0", "pos": ["b"]}, {"query": "What?", "pos": ["c"]}]
    few_shot = {"instructions": ["i"], "few_shot": {"zero_shot": 0, "most": 2}}
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows), **few_shot)
    assert {shown.query for drawn in draw_examples(source, 0, 0) for shown in drawn.few_shot} == {"What?"}


def test_a_batch_without_duplicates_has_no_equal_texts(tmp_path: Path) -> None:
    rows = [{"query": text, "pos": [f"p{i}"]} for i, text in enumerate(["same", "Same", "same\n", "same\u200b", *"abcdefgh"])]
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", rows))
    sampler: Any = BatchSampler(sources=[source], tokenizer=None, hard_negatives=0, seed=0, no_duplicates=True)  # type: ignore[arg-type]
    drawn = sampler._draw_batch(0, np.arange(4))
    assert len({normalize_text(drawn_example.query) for drawn_example in drawn}) == 4


def test_statistics_count_equal_texts_as_duplicates(tmp_path: Path) -> None:
    first = [{"query": "Who?", "pos": ["a"]}, {"query": "who? ", "pos": ["A\n"]}, {"query": "what", "pos": ["b"]}]
    paths = [
        write_jsonl(tmp_path / "a.jsonl", first),
        write_jsonl(tmp_path / "b.jsonl", [{"query": "WHAT", "pos": ["B\u00a0"]}]),
    ]
    data = DataConfig.model_validate({"sources": [{"path": str(path)} for path in paths]})
    stats = compute_stats(data, tmp_path, None)
    assert (stats["sources"][0]["duplicate_queries"], stats["sources"][0]["duplicate_pairs"]) == (1, 1)
    assert stats["shared"][0]["queries"] == 1 and stats["shared"][0]["texts"] == 2


def test_old_data_keeps_its_digest(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": ["p"], "neg": ["Q"]}, {"query": "r", "pos": ["p"]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    digest = "5fa4e6f5f04012a606ae58512d94bb10de603f25a0c1464140d9021f125cc643"
    assert open_sources(DataConfig.model_validate({"sources": [{"path": str(path)}]}), tmp_path)[0].digest == digest
