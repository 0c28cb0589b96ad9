"""Masks as literal matrices, of a row that holds texts of three and two tokens and one token of padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.model.masks import MASKS, Mask, visible

SEGMENTS = jnp.array([1, 1, 1, 2, 2, 0])
POSITIONS = jnp.array([0, 1, 2, 0, 1, 0])

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
    ("mask", "name"),
    [
        (MASKS["causal"], "causal"),
        (MASKS["bidirectional"], "bidirectional"),
        (Mask(causal=True, window=2), "causal window of two"),
        (Mask(causal=False, window=1), "bidirectional window of one"),
        (Mask(causal=True, window=3), "causal"),
        (Mask(causal=False, window=2), "bidirectional"),
    ],
)
def test_who_sees_whom(mask: Mask, name: str) -> None:
    assert np.array_equal(visible(mask, SEGMENTS, POSITIONS), matrix(name))


def test_rows_do_not_meet() -> None:
    rows = jnp.stack([SEGMENTS, jnp.ones(6, int)])
    positions = jnp.stack([POSITIONS, jnp.arange(6)])
    seen = visible(MASKS["causal"], rows, positions)
    assert np.array_equal(seen[0], matrix("causal"))
    assert np.array_equal(seen[1], np.tri(6, dtype=bool))


def test_no_row_is_empty() -> None:
    segments, positions = jnp.array([0, 0, 1]), jnp.array([0, 0, 0])
    for mask in (*MASKS.values(), Mask(True, 1), Mask(False, 0)):
        assert visible(mask, segments, positions).any(axis=-1).all()
