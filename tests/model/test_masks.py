"""Masks compared with literal matrices.

The row holds a text of three tokens, a text of two tokens and one token of padding. The first two tokens of the first text
are its instruction.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.model.masks import MASKS, Mask, TokenInfo, materialize_mask

SEGMENTS = jnp.array([1, 1, 1, 2, 2, 0])
POSITIONS = jnp.array([0, 1, 2, 0, 1, 0])
IN_TEXT = jnp.array([False, False, True, True, True, False])
ROW = TokenInfo(SEGMENTS, POSITIONS, IN_TEXT)

MATRICES = {
    "causal": """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 0 1 0 0
        0 0 0 1 1 0
        0 0 0 0 0 1
    """,
    "bidirectional": """
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        0 0 0 1 1 0
        0 0 0 1 1 0
        0 0 0 0 0 1
    """,
    "prefix": """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 0 1 1 0
        0 0 0 1 1 0
        0 0 0 0 0 1
    """,
    "prefix_lm": """
        1 1 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 0 1 0 0
        0 0 0 1 1 0
        0 0 0 0 0 1
    """,
    "prefix_lm, window 1": """
        1 1 0 0 0 0
        1 1 0 0 0 0
        0 1 1 0 0 0
        0 0 0 1 0 0
        0 0 0 1 1 0
        0 0 0 0 0 1
    """,
    "causal, window 2": """
        1 0 0 0 0 0
        1 1 0 0 0 0
        0 1 1 0 0 0
        0 0 0 1 0 0
        0 0 0 1 1 0
        0 0 0 0 0 1
    """,
    "bidirectional, window 1": """
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 1 1 0 0 0
        0 0 0 1 1 0
        0 0 0 1 1 0
        0 0 0 0 0 1
    """,
}


def parse_matrix(name: str) -> np.ndarray:
    return np.array([[digit == "1" for digit in line.split()] for line in MATRICES[name].strip().splitlines()])


@pytest.mark.parametrize(
    ("mask", "window", "name"),
    [
        (MASKS["causal"], None, "causal"),
        (MASKS["bidirectional"], None, "bidirectional"),
        (MASKS["prefix"], None, "prefix"),
        (MASKS["prefix_lm"], None, "prefix_lm"),
        (MASKS["causal"], 2, "causal, window 2"),
        (MASKS["bidirectional"], 1, "bidirectional, window 1"),
        (MASKS["prefix_lm"], 1, "prefix_lm, window 1"),
        (MASKS["causal"], jnp.array(3), "causal"),
        (MASKS["bidirectional"], jnp.array(2), "bidirectional"),
    ],
)
def test_mask_equals_its_matrix(mask: Mask, window: int | None, name: str) -> None:
    assert np.array_equal(materialize_mask(mask, ROW, window), parse_matrix(name))


def test_prefix_masks_without_instruction_are_the_masks_of_the_text() -> None:
    row = ROW.replace(in_text=SEGMENTS > 0)
    assert np.array_equal(materialize_mask(MASKS["prefix"], row), parse_matrix("bidirectional"))
    assert np.array_equal(materialize_mask(MASKS["prefix_lm"], row), parse_matrix("causal"))


def test_rows_are_independent() -> None:
    whole = TokenInfo(jnp.ones(6, int), jnp.arange(6), jnp.ones(6, bool))
    seen = materialize_mask(MASKS["causal"], jax.tree.map(lambda *rows: jnp.stack(rows), ROW, whole))
    assert np.array_equal(seen[0], parse_matrix("causal"))
    assert np.array_equal(seen[1], np.tri(6, dtype=bool))


@pytest.mark.parametrize("window", [None, 1])
def test_every_token_attends_to_a_token(window: int | None) -> None:
    token_info = TokenInfo(jnp.array([0, 0, 1]), jnp.array([0, 0, 0]), jnp.array([False, False, True]))
    for mask in MASKS.values():
        assert materialize_mask(mask, token_info, window).any(axis=-1).all()
