"""Files that are cut, left unfinished, or far too long: one line, and no memory that grows with them."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from helpers.sources import PAIR_ROWS, open_source_file, write_jsonl
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data import tokenize
from jaxembed.data.rows import MAX_UNFINISHED_AGE_S, UNFINISHED_PREFIX
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.data.vector_store import VECTORS_FILE, VectorStore
from jaxembed.errors import UserError


def test_stored_vectors_that_are_truncated_while_in_use_are_refused(tmp_path: Path) -> None:
    """A memory map would end the process by a SIGBUS."""
    keys, vectors = [bytes([i]) * 16 for i in range(4)], np.ones((4, 3000), np.float32)
    store = VectorStore(tmp_path, 3000)
    store.fetch(keys, lambda places: vectors[places])
    os.truncate(tmp_path / VECTORS_FILE, 12_000 * 2)
    assert np.array_equal(store.fetch(keys[:2], lambda places: vectors[:0]), vectors[:2])
    with pytest.raises(UserError, match=r"the stored vectors are damaged \(2 of the 4 read differ from their checksums\)"):
        store.fetch(keys, lambda places: vectors[:0])


def test_indexes_that_killed_processes_left_are_removed(tmp_path: Path) -> None:
    """An index that another process is writing stays."""
    folder = tmp_path / "rows"
    folder.mkdir()
    stale, young = folder / f"{UNFINISHED_PREFIX}a", folder / f"{UNFINISHED_PREFIX}b"
    for path in (stale, young):
        path.touch()
    os.utime(stale, (0, time.time() - MAX_UNFINISHED_AGE_S - 1))
    open_source_file(write_jsonl(tmp_path / "a.jsonl", PAIR_ROWS))
    assert not stale.exists() and young.exists()


def test_a_long_text_is_truncated_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and the statistics take a text of any length, with the tokens that the cut text has."""
    monkeypatch.setattr(tokenize, "MAX_TEXT_CHARS", 1000)
    tokenizer = TextTokenizer(tiny.build_tokenizer(), EmbeddingSpec(max_length=50, query_suffix=" end"))
    long = "the quick brown fox " * 200_000
    tracemalloc.start()
    tokens = tokenizer([long], ["query: "]).ids[0]
    count = tokenizer.count_untruncated_tokens([long], [""])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert np.array_equal(tokens, tokenizer([long[:1000]], ["query: "]).ids[0]) and len(tokens) > 40
    assert count == tokenizer.count_untruncated_tokens([long[:1000]], [""])
