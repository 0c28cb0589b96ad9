"""Packing puts every text in exactly one place, and the vector of a text depends on that text alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.loading import draw_texts, encode_packed, load_model, pack_texts
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.packing import (
    MIN_FILL,
    PackedTexts,
    compute_max_segments,
    fill_rows,
    pack_by_length,
    pack_rows,
    pack_shards,
    round_up_rows,
)
from jaxembed.data.shard_packing import merge_row_counts
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.pooling import POOLINGS

Folder = Callable[[str], Path]


@st.composite
def draw_lengths(draw: st.DrawFn) -> tuple[list[int], int]:
    """Draw the lengths of some texts, and a row length that is at least as long as each."""
    row_length = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(0, row_length), max_size=60)), row_length


@given(draw_lengths())
def test_every_text_has_one_place_and_no_row_is_overfull(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    row, segment, row_count = pack_rows(lengths, row_length)
    assert sorted(set(row.tolist())) == list(range(row_count))
    for r in range(row_count):
        assert sum(np.array(lengths)[row == r]) <= row_length
        assert sorted(segment[row == r]) == list(range(np.sum(row == r)))
        assert np.sum(row == r) <= compute_max_segments(row_length)


@given(draw_lengths())
def test_at_most_one_row_is_half_empty(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    # Texts of at least 8 tokens, so that no row is closed by many short texts.
    lengths = [max(8, length) for length in lengths if row_length >= 8]
    row, _, row_count = pack_rows(lengths, row_length)
    filled = [sum(np.array(lengths)[row == r]) for r in range(row_count)]
    assert sum(2 * tokens <= row_length for tokens in filled) <= 1


@given(st.lists(draw_lengths(), min_size=1, max_size=3))
def test_shards_share_a_shape_no_larger_than_full_rows(cases: list[tuple[list[int], int]]) -> None:
    row_length = max(length for _, length in cases)
    shards = [np.array(lengths, np.int64) for lengths, _ in cases]
    packings, (rows, shorter) = pack_shards(shards, row_length)
    assert shorter <= row_length
    assert rows == round_up_rows(max(pack_rows(lengths, row_length).row_count for lengths in shards))
    for lengths, (row, segment, _) in zip(shards, packings, strict=True):
        fill_rows(draw_texts(lengths.tolist()), [0] * len(lengths), row, segment, (rows, shorter))
        for r in range(rows):
            assert sum(lengths[row == r]) <= shorter
            assert np.sum(row == r) <= compute_max_segments(shorter)


@given(st.lists(draw_lengths(), min_size=2, max_size=3))
def test_processes_with_one_shard_each_choose_the_shape_of_one_process(cases: list[tuple[list[int], int]]) -> None:
    row_length = max(length for _, length in cases)
    shards = [np.array(lengths, np.int64) for lengths, _ in cases]
    messages: list[bytes] = []

    def record_message(needed: Iterator[int]) -> Iterator[int]:
        messages.append(np.array([1, 2, *needed]).tobytes())
        return iter(np.frombuffer(messages[-1], np.int64)[2:].tolist())

    for shard in shards:
        pack_shards([shard], row_length, record_message)
    tokens, token_pairs, *rows = np.frombuffer(merge_row_counts(messages), np.int64).tolist()
    packings, shape = pack_shards(shards, row_length)
    assert (tokens, token_pairs) == (len(shards), 2 * len(shards))
    for shard, expected in zip(shards, packings, strict=True):
        (packing,), agreed_shape = pack_shards([shard], row_length, lambda needed: iter(rows))
        assert agreed_shape == shape
        assert np.array_equal(packing.row, expected.row) and np.array_equal(packing.segment, expected.segment)


def test_half_empty_last_row_shortens_all_rows() -> None:
    _, shape = pack_shards([np.full(29, 30)], 256)  # 8 texts of 30 in a row, 5 in the fourth
    assert shape == (4, 240)


def test_text_goes_to_the_fullest_row_with_room_for_it() -> None:
    row, segment, row_count = pack_rows([9, 10, 22, 20, 32], 32)
    assert row_count == 3
    assert row.tolist() == [2, 1, 1, 2, 0]  # 32 | 22 + 10 | 20 + 9
    assert segment.tolist() == [1, 1, 0, 0, 0]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=300))
def test_short_texts_go_to_short_rows_that_they_fill(drawn: list[int]) -> None:
    lengths, rows_per_call = np.array(drawn), lambda row_length: 128 // row_length
    packed = list(pack_by_length(lengths, 16, rows_per_call))
    *longer, (rest, (*_, last_count), shortest) = packed
    assert sorted(np.concatenate([texts for texts, *_ in packed])) == list(range(len(lengths)))
    for texts, (row, _, row_count), row_length in packed:
        filled = np.bincount(row, weights=lengths[texts], minlength=row_count)
        assert len(filled) == row_count and filled.max(initial=0) <= row_length
    for texts, (_, _, row_count), row_length in longer:
        surplus = row_count - (lengths[texts] > row_length // 2).sum()
        assert 0 <= surplus < rows_per_call(row_length) and row_count % rows_per_call(row_length) == 0
    assert [row_length for *_, row_length in packed] == sorted({row_length for *_, row_length in packed}, reverse=True)
    if not longer:
        assert shortest // 2 < max(16, lengths.max()) <= shortest
    elif last_count > 1:
        assert lengths[rest].sum() > MIN_FILL * (last_count - 1) * shortest


def test_rows_are_short_except_for_long_texts() -> None:
    packed = list(pack_by_length(np.array([8] * 70 + [100]), 16, lambda row_length: 128 // row_length))
    sizes = [(len(texts), row_count, row_length) for texts, (_, _, row_count), row_length in packed]
    assert sizes == [(4, 1, 128), (67, 34, 16)]


@given(draw_lengths(), st.randoms(use_true_random=False))
def test_arrays_hold_every_text_at_its_place(case: tuple[list[int], int], random: Any) -> None:
    lengths, row_length = case
    texts = draw_texts(lengths)
    pool_start = [random.randint(0, length) for length in lengths]
    row, segment, row_count = pack_rows(lengths, row_length)
    arrays = fill_rows(texts, pool_start, row, segment, (row_count + 1, row_length))
    for i, text in enumerate(texts):
        members = arrays["segment_ids"][row[i]] == segment[i] + 1
        assert np.array_equal(arrays["tokens"][row[i]][members], text)
        assert np.array_equal(arrays["positions"][row[i]][members], np.arange(len(text)))
        assert np.array_equal(arrays["pool_mask"][row[i]][members], np.arange(len(text)) >= pool_start[i])
    padding = arrays["segment_ids"] == 0
    assert padding.sum() == padding.size - sum(lengths)
    assert not any(arrays[name][padding].any() for name in arrays)


@given(draw_lengths())
def test_segments_of_a_row_are_in_order_without_gaps(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    row, segment, row_count = pack_rows(lengths, row_length)
    segment_ids = fill_rows(draw_texts(lengths), [0] * len(lengths), row, segment, (row_count, row_length))["segment_ids"]
    for ids in segment_ids:
        used = ids[ids > 0]
        assert np.array_equal(ids[: len(used)], used)
        assert (np.diff(used) >= 0).all()


def test_row_counts_take_few_values() -> None:
    sizes = [round_up_rows(rows) for rows in range(1, 3000)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert all(round_up_rows(size) == size for size in sizes)
    assert all(size <= max(rows + 1, 1.06 * rows) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 120


ROWS, ROW_LENGTH = 16, 32


def pack_into(texts: list[np.ndarray], pool_start: np.ndarray, row: np.ndarray, shards: int) -> tuple[PackedTexts, np.ndarray]:
    """Pack text i into row `row[i]`, in order. Also return the index of each text among the vectors [R * S]."""
    segment = np.array([np.sum(row[:i] == row[i]) for i in range(len(row))])
    arrays = fill_rows(texts, pool_start, row, segment, (ROWS, ROW_LENGTH))
    arrays = {name: jax.device_put(array) for name, array in arrays.items()}
    segments = compute_max_segments(ROW_LENGTH)
    return PackedTexts(**arrays, segments=segments, shards=shards), row * segments + segment


def encode_separately(model: EmbeddingModel, params: Any, texts: list[np.ndarray], pool_start: np.ndarray) -> np.ndarray:
    """Encode each text alone in its row."""
    parts = []
    for start in range(0, len(texts), ROWS):
        some, starts = texts[start : start + ROWS], pool_start[start : start + ROWS]
        parts.append(encode_packed(model, params, *pack_into(some, starts, np.arange(len(some)), 1)))
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("attention", "pooling"), [*itertools.product(("causal", "bidirectional"), ("mean", "last")), ("prefix", "self_attention")]
)
def test_vector_depends_only_on_its_text(base_folder: Folder, attention: str, pooling: str) -> None:
    spec = EmbeddingSpec(attention=attention, pooling=pooling, include_instruction=False)
    loaded = {devices: load_model(base_folder("qwen2"), spec, devices) for devices in (1, 8)}
    random = np.random.default_rng(0)
    for draw in range(6):
        lengths = random.integers(1, 16, 28)
        texts = draw_texts(lengths, seed=draw)
        pool_start = random.integers(0, lengths)
        expected = encode_separately(*loaded[1], texts, pool_start)
        order = random.permutation(28)
        row = random.permutation(np.arange(32) % ROWS)[:28]  # at most two texts per row
        for shards, devices in ((1, 1), (8, 8)):
            packed, index = pack_into([texts[i] for i in order], pool_start[order], row, shards)
            encoded = encode_packed(*loaded[devices], packed, index, devices)
            assert np.abs(encoded - expected[order]).max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_wrong_segments_change_vectors(base_folder: Folder, attention: str, pooling: str) -> None:
    """Show that the test above can fail."""
    model, params = load_model(base_folder("qwen2"), EmbeddingSpec(attention=attention, pooling=pooling))
    texts, pool_start = draw_texts([9] * 2 * ROWS), np.zeros(2 * ROWS, int)
    packed, index = pack_into(texts, pool_start, np.arange(2 * ROWS) % ROWS, 1)
    expected = encode_separately(model, params, texts, pool_start)
    assert np.abs(encode_packed(model, params, packed, index) - expected).max() < 1e-5
    # Wrong inputs: a token of the second text belongs to the first, both texts are one, positions are off by one.
    shifted = packed.replace(segment_ids=packed.segment_ids.at[:, 9].set(1))
    merged = packed.replace(segment_ids=jnp.minimum(packed.segment_ids, 1))
    late = packed.replace(positions=jnp.maximum(packed.positions - 1, 0))
    for broken in (shifted, merged, late):
        assert np.abs(encode_packed(model, params, broken, index) - expected).max() > 1e-3


def test_absent_texts_have_zero_vectors(base_folder: Folder) -> None:
    for pooling in POOLINGS:
        model, params = load_model(base_folder("qwen2"), EmbeddingSpec(pooling=pooling, latents=5))
        packed, index = pack_texts(draw_texts([3, 4]), 32)
        all_slots = encode_packed(model, params, packed, np.arange(4))
        assert np.array_equal(np.linalg.norm(all_slots, axis=1).round(5)[[*index, 2, 3]], [1, 1, 0, 0])


def test_instruction_tokens_are_pooled_unless_left_out(base_folder: Folder) -> None:
    texts = draw_texts([9])
    model, params = load_model(base_folder("qwen2"), EmbeddingSpec(include_instruction=False))
    inclusive = model.clone(spec=EmbeddingSpec())
    whole, late = pack_texts(texts, 32), pack_texts(texts, 32, pool_start=[4])
    assert np.array_equal(encode_packed(inclusive, params, *late), encode_packed(model, params, *whole))
    assert np.abs(encode_packed(model, params, *late) - encode_packed(model, params, *whole)).max() > 1e-3


def test_vectors_are_not_normalized_without_normalize(base_folder: Folder) -> None:
    packed = pack_texts(draw_texts([9, 5]), 32)
    model, params = load_model(base_folder("qwen2"), EmbeddingSpec())
    raw = encode_packed(model.clone(spec=EmbeddingSpec(normalize=False)), params, *packed)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.1).all()
    assert np.abs(raw / lengths - encode_packed(model, params, *packed)).max() < 1e-6
