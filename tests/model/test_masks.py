"""Masks as literal matrices, of a row that holds texts of three and two tokens and one token of padding.

The first two tokens of the first text are its instruction.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.model.masks import MASKS, Mask, TokenInfo, visible

SEGMENTS = jnp.array([1, 1, 1, 2, 2, 0])
POSITIONS = jnp.array([0, 1, 2, 0, 1, 0])
IN_TEXT = jnp.array([False, False, True, True, True, False])
ROW = TokenInfo(SEGMENTS, POSITIONS, IN_TEXT)

DRAWINGS = {
    "causal": """
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . . . 1 . .
        . . . 1 1 .
        . . . . . 1
    """,
    "bidirectional": """
        1 1 1 . . .
        1 1 1 . . .
        1 1 1 . . .
        . . . 1 1 .
        . . . 1 1 .
        . . . . . 1
    """,
    "prefix": """
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . . . 1 1 .
        . . . 1 1 .
        . . . . . 1
    """,
    "prefix_lm": """
        1 1 . . . .
        1 1 . . . .
        1 1 1 . . .
        . . . 1 . .
        . . . 1 1 .
        . . . . . 1
    """,
    "prefix_lm window of one": """
        1 1 . . . .
        1 1 . . . .
        . 1 1 . . .
        . . . 1 . .
        . . . 1 1 .
        . . . . . 1
    """,
    "causal window of two": """
        1 . . . . .
        1 1 . . . .
        . 1 1 . . .
        . . . 1 . .
        . . . 1 1 .
        . . . . . 1
    """,
    "bidirectional window of one": """
        1 1 . . . .
        1 1 1 . . .
        . 1 1 . . .
        . . . 1 1 .
        . . . 1 1 .
        . . . . . 1
    """,
}


def matrix(name: str) -> np.ndarray:
    return np.array([[sign == "1" for sign in line.split()] for line in DRAWINGS[name].strip().splitlines()])


@pytest.mark.parametrize(
    ("mask", "window", "name"),
    [
        (MASKS["causal"], None, "causal"),
        (MASKS["bidirectional"], None, "bidirectional"),
        (MASKS["prefix"], None, "prefix"),
        (MASKS["prefix_lm"], None, "prefix_lm"),
        (MASKS["causal"], 2, "causal window of two"),
        (MASKS["bidirectional"], 1, "bidirectional window of one"),
        (MASKS["prefix_lm"], 1, "prefix_lm window of one"),
        (MASKS["causal"], jnp.array(3), "causal"),
        (MASKS["bidirectional"], jnp.array(2), "bidirectional"),
    ],
)
def test_who_sees_whom(mask: Mask, window: int | None, name: str) -> None:
    assert np.array_equal(visible(mask, ROW, window), matrix(name))


def test_a_prefix_without_instruction_is_the_texts_mask() -> None:
    row = ROW.replace(in_text=SEGMENTS > 0)
    assert np.array_equal(visible(MASKS["prefix"], row), matrix("bidirectional"))
    assert np.array_equal(visible(MASKS["prefix_lm"], row), matrix("causal"))


def test_rows_do_not_meet() -> None:
    whole = TokenInfo(jnp.ones(6, int), jnp.arange(6), jnp.ones(6, bool))
    seen = visible(MASKS["causal"], TokenInfo(*(jnp.stack(pair) for pair in zip(fields(ROW), fields(whole), strict=True))))
    assert np.array_equal(seen[0], matrix("causal"))
    assert np.array_equal(seen[1], np.tri(6, dtype=bool))


def fields(places: TokenInfo) -> tuple[jnp.ndarray, ...]:
    return places.segment, places.position, places.in_text


@pytest.mark.parametrize("window", [None, 1])
def test_no_row_is_empty(window: int | None) -> None:
    places = TokenInfo(jnp.array([0, 0, 1]), jnp.array([0, 0, 0]), jnp.array([False, False, True]))
    for mask in MASKS.values():
        assert visible(mask, places, window).any(axis=-1).all()
