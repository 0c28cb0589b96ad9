"""Long texts by pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxembed import Embedder
from jaxembed.errors import UserError

LONG = "the quick brown fox jumps over the lazy dog and the dog sleeps " * 20


@pytest.fixture(scope="module")
def model(base_folder: Callable[[str], Path]) -> Embedder:
    return Embedder.load(base_folder("qwen3"))


@pytest.mark.parametrize(("way", "combine"), [("mean", np.mean), ("max", np.max)])
def test_a_long_text_is_read_to_its_end(model: Embedder, way: str, combine: Callable[..., np.ndarray]) -> None:
    texts = ["short", LONG + "and wakes up", "also short", LONG]
    (pieces,) = model.tokenizer.pieces([texts[1]], "query: ")
    assert len(pieces) > 2
    together = combine(model.encode(pieces, prompt="query: "), axis=0)
    got = model.encode(texts, prompt="query: ", long_texts=way)
    np.testing.assert_allclose(got[1], together / np.linalg.norm(together), atol=1e-5)
    cut = model.encode(texts, prompt="query: ")
    np.testing.assert_allclose(got[[0, 2]], cut[[0, 2]], atol=1e-5)
    assert np.array_equal(cut[1], cut[3])  # they differ past the cut only
    assert np.abs(got[1] - got[3]).max() > 1e-3
    narrow = model.encode(texts, prompt="query: ", long_texts=way, dim=8)
    np.testing.assert_allclose(narrow, got[:, :8] / np.linalg.norm(got[:, :8], axis=1, keepdims=True), atol=1e-5)


def test_an_unknown_way_is_refused(model: Embedder) -> None:
    with pytest.raises(UserError, match="long_texts is 'middle'; expected cut, mean, max"):
        model.encode(["x"], long_texts="middle")
