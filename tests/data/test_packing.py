"""Packing places every text once, and a text's vector depends on nothing but the text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.loading import draw_texts, in_rows, load, vectors
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import merged
from jaxembed.data.packing import FULL, PackedTexts, bucket, fill, max_segments, pack, pack_by_length, pack_shards
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.pooling import POOLINGS

Folder = Callable[[str], Path]


@st.composite
def lengths_and_row(draw: st.DrawFn) -> tuple[list[int], int]:
    row_length = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(0, row_length), max_size=60)), row_length


@given(lengths_and_row())
def test_every_text_has_one_place_and_no_row_is_overfull(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    row, place, rows = pack(lengths, row_length)
    assert sorted(set(row.tolist())) == list(range(rows))
    for r in range(rows):
        assert sum(np.array(lengths)[row == r]) <= row_length
        assert sorted(place[row == r]) == list(range(np.sum(row == r)))
        assert np.sum(row == r) <= max_segments(row_length)


@given(lengths_and_row())
def test_at_most_one_row_is_half_empty(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    lengths = [max(8, length) for length in lengths if row_length >= 8]  # so that no row is closed by many short texts
    row, _, rows = pack(lengths, row_length)
    filled = [sum(np.array(lengths)[row == r]) for r in range(rows)]
    assert sum(2 * tokens <= row_length for tokens in filled) <= 1


@given(st.lists(lengths_and_row(), min_size=1, max_size=3))
def test_shards_share_a_shape_that_is_never_larger_than_whole_rows(cases: list[tuple[list[int], int]]) -> None:
    row_length = max(row for _, row in cases)
    shards = [np.array(lengths, np.int64) for lengths, _ in cases]
    packs, (rows, shorter) = pack_shards(shards, row_length)
    assert shorter <= row_length
    assert rows == bucket(max(pack(lengths, row_length)[2] for lengths in shards))
    for lengths, (row, place) in zip(shards, packs, strict=True):
        fill(draw_texts(lengths.tolist()), [0] * len(lengths), row, place, (rows, shorter))
        for r in range(rows):
            assert sum(lengths[row == r]) <= shorter
            assert np.sum(row == r) <= max_segments(shorter)


@given(st.lists(lengths_and_row(), min_size=2, max_size=3))
def test_processes_that_pack_a_shard_each_agree_on_the_shape_that_one_would_choose(cases: list[tuple[list[int], int]]) -> None:
    row_length = max(row for _, row in cases)
    shards = [np.array(lengths, np.int64) for lengths, _ in cases]
    messages: list[bytes] = []

    def tell(needed: Iterator[int]) -> Iterator[int]:
        messages.append(np.array([1, 2, *needed]).tobytes())
        return iter(np.frombuffer(messages[-1], np.int64)[2:].tolist())

    for shard in shards:
        pack_shards([shard], row_length, tell)
    tokens, pairs, *rows = np.frombuffer(merged(messages), np.int64).tolist()
    packs, shape = pack_shards(shards, row_length)
    assert (tokens, pairs) == (len(shards), 2 * len(shards))
    for shard, of_one in zip(shards, packs, strict=True):
        (alone,), agreed = pack_shards([shard], row_length, lambda needed: iter(rows))
        assert agreed == shape
        assert all(np.array_equal(*pair) for pair in zip(alone, of_one, strict=True))


def test_a_half_empty_last_row_shortens_all() -> None:
    _, shape = pack_shards([np.full(29, 30)], 256)  # 8 texts of 30 in a row, 5 in the fourth
    assert shape == (4, 240)


def test_the_fullest_row_that_takes_a_text_gets_it() -> None:
    row, place, rows = pack([9, 10, 22, 20, 32], 32)
    assert rows == 3
    assert row.tolist() == [2, 1, 1, 2, 0]  # 32 | 22 + 10 | 20 + 9
    assert place.tolist() == [1, 1, 0, 0, 0]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=300))
def test_short_texts_that_fill_short_rows_lie_in_them(drawn: list[int]) -> None:
    lengths, at_once = np.array(drawn), lambda row_length: 128 // row_length
    packed = list(pack_by_length(lengths, 16, at_once))
    *longer, (rest, (*_, last), shortest) = packed
    assert sorted(np.concatenate([texts for texts, *_ in packed])) == list(range(len(lengths)))
    for texts, (row, _, rows), row_length in packed:
        filled = np.bincount(row, weights=lengths[texts], minlength=rows)
        assert len(filled) == rows and filled.max(initial=0) <= row_length
    for texts, (_, _, rows), row_length in longer:
        assert 0 <= rows - (lengths[texts] > row_length // 2).sum() < at_once(row_length) and rows % at_once(row_length) == 0
    assert [row_length for *_, row_length in packed] == sorted({row_length for *_, row_length in packed}, reverse=True)
    if not longer:
        assert shortest // 2 < max(16, lengths.max()) <= shortest
    elif last > 1:
        assert lengths[rest].sum() > FULL * (last - 1) * shortest


def test_rows_are_short_for_all_but_the_long_texts() -> None:
    packed = list(pack_by_length(np.array([8] * 70 + [100]), 16, lambda row_length: 128 // row_length))
    assert [(len(texts), rows, row_length) for texts, (_, _, rows), row_length in packed] == [(4, 1, 128), (67, 34, 16)]


@given(lengths_and_row(), st.randoms(use_true_random=False))
def test_the_arrays_hold_every_text_at_its_place(case: tuple[list[int], int], random: Any) -> None:
    lengths, row_length = case
    texts = draw_texts(lengths)
    pool_from = [random.randint(0, length) for length in lengths]
    row, place, rows = pack(lengths, row_length)
    arrays = fill(texts, pool_from, row, place, (rows + 1, row_length))
    for i, text in enumerate(texts):
        at = arrays["segment_ids"][row[i]] == place[i] + 1
        assert np.array_equal(arrays["tokens"][row[i]][at], text)
        assert np.array_equal(arrays["positions"][row[i]][at], np.arange(len(text)))
        assert np.array_equal(arrays["pool_mask"][row[i]][at], np.arange(len(text)) >= pool_from[i])
    padding = arrays["segment_ids"] == 0
    assert padding.sum() == padding.size - sum(lengths)
    assert not any(arrays[name][padding].any() for name in arrays)


@given(lengths_and_row())
def test_segments_of_a_row_stand_in_order_without_gaps(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    row, place, rows = pack(lengths, row_length)
    segment_ids = fill(draw_texts(lengths), [0] * len(lengths), row, place, (rows, row_length))["segment_ids"]
    for ids in segment_ids:
        used = ids[ids > 0]
        assert np.array_equal(ids[: len(used)], used)
        assert (np.diff(used) >= 0).all()


def test_row_counts_come_in_a_short_ladder() -> None:
    sizes = [bucket(rows) for rows in range(1, 3000)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert all(bucket(size) == size for size in sizes)
    assert all(size <= max(rows + 1, 1.06 * rows) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 120


ROWS, ROW = 16, 32


def placed(texts: list[np.ndarray], pool_from: np.ndarray, row: np.ndarray, shards: int) -> tuple[PackedTexts, np.ndarray]:
    """Texts in these rows, in the order in which they come."""
    place = np.array([np.sum(row[:i] == row[i]) for i in range(len(row))])
    arrays = fill(texts, pool_from, row, place, (ROWS, ROW))
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    return PackedTexts(**arrays, segments=max_segments(ROW), shards=shards), row * max_segments(ROW) + place


def alone(model: EmbeddingModel, params: Any, texts: list[np.ndarray], pool_from: np.ndarray) -> np.ndarray:
    """The vectors of texts, each alone in its row."""
    rows = np.arange(ROWS)
    parts = [slice(start, start + ROWS) for start in range(0, len(texts), ROWS)]
    return np.concatenate([vectors(model, params, *placed(texts[p], pool_from[p], rows[: len(texts[p])], 1)) for p in parts])


@pytest.mark.parametrize(
    ("attention", "pooling"), [*itertools.product(("causal", "bidirectional"), ("mean", "last")), ("prefix", "self_attention")]
)
def test_a_vector_depends_on_its_text_alone(base_folder: Folder, attention: str, pooling: str) -> None:
    spec = EmbeddingSpec(attention, pooling)
    loaded = {devices: load(base_folder("qwen2"), spec, devices) for devices in (1, 8)}
    random = np.random.default_rng(0)
    for draw in range(6):
        lengths = random.integers(1, 16, 28)
        texts = draw_texts(lengths, seed=draw)
        pool_from = random.integers(0, lengths)
        want = alone(*loaded[1], texts, pool_from)
        order = random.permutation(28)
        row = random.permutation(np.arange(32) % ROWS)[:28]  # at most two texts a row
        for shards, devices in ((1, 1), (8, 8)):
            packed, index = placed([texts[i] for i in order], pool_from[order], row, shards)
            got = vectors(*loaded[devices], packed, index, devices)
            assert np.abs(got - want[order]).max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_lost_borders_of_segments_would_show(base_folder: Folder, attention: str, pooling: str) -> None:
    model, params = load(base_folder("qwen2"), EmbeddingSpec(attention, pooling))
    texts, pool_from = draw_texts([9] * 2 * ROWS), np.zeros(2 * ROWS, int)
    packed, index = placed(texts, pool_from, np.arange(2 * ROWS) % ROWS, 1)
    want = alone(model, params, texts, pool_from)
    assert np.abs(vectors(model, params, packed, index) - want).max() < 1e-5
    shifted = packed.replace(segment_ids=packed.segment_ids.at[:, 9].set(1))  # a token of the second text to the first
    merged = packed.replace(segment_ids=jnp.minimum(packed.segment_ids, 1))
    restarted = packed.replace(positions=jnp.maximum(packed.positions - 1, 0))
    for broken in (shifted, merged, restarted):
        assert np.abs(vectors(model, params, broken, index) - want).max() > 1e-3


def test_absent_texts_give_zeros(base_folder: Folder) -> None:
    for pooling in POOLINGS:
        model, params = load(base_folder("qwen2"), EmbeddingSpec(pooling=pooling, latents=5))
        packed, index = in_rows(draw_texts([3, 4]), 32)
        everything = vectors(model, params, packed, np.arange(4))
        assert np.array_equal(np.linalg.norm(everything, axis=1).round(5)[[*index, 2, 3]], [1, 1, 0, 0])


def test_instruction_tokens_are_pooled_where_the_spec_says_so(base_folder: Folder) -> None:
    texts = draw_texts([9])
    model, params = load(base_folder("qwen2"), EmbeddingSpec())
    inclusive = model.clone(spec=EmbeddingSpec(include_instruction=True))
    whole, late = in_rows(texts, 32), in_rows(texts, 32, pool_from=[4])
    assert np.array_equal(vectors(inclusive, params, *late), vectors(model, params, *whole))
    assert np.abs(vectors(model, params, *late) - vectors(model, params, *whole)).max() > 1e-3


def test_length_is_kept_where_the_spec_says_so(base_folder: Folder) -> None:
    packed = in_rows(draw_texts([9, 5]), 32)
    model, params = load(base_folder("qwen2"), EmbeddingSpec())
    raw = vectors(model.clone(spec=EmbeddingSpec(normalize=False)), params, *packed)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.1).all()
    assert np.abs(raw / lengths - vectors(model, params, *packed)).max() < 1e-6
