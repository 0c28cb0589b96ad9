"""Mining knows equal texts by the same rule as training."""

from __future__ import annotations

from pathlib import Path

from helpers.sources import open_source_file, write_jsonl
from jaxembed.curation.pool import read_pool


def test_texts_that_differ_in_case_spaces_or_encoding_are_no_candidates(tmp_path: Path) -> None:
    rows = [{"query": "who?", "pos": ["Un café"]}, {"query": "Who? ", "pos": ["b"]}]
    corpus = ["un cafe\u0301", "un\u00a0CAFÉ", "un ca\u200bfé\n", "WHO?", "b ", "else"]
    pool = read_pool(open_source_file(write_jsonl(tmp_path / "a.jsonl", rows)), corpus, 0)
    searched = pool.documents[: pool.corpus_size]
    assert searched == ["un cafe\u0301", "WHO?", "b ", "else"]
    for excluded in pool.excluded_documents:
        assert [text for i, text in enumerate(searched) if i not in excluded] == ["else"]
