"""Attention masks as values: who may look at whom inside one text.

A mask answers from where two tokens of the same text stand. `visible` combines it with the segments of packed rows, the
only place where the two meet. Two texts of three and two tokens and one of padding; `i` is an instruction's token:

              causal            bidirectional     prefix            prefix_lm
    text 1 i  1 . . . . .       1 1 1 . . .       1 . . . . .       1 1 . . . .
    text 1 i  1 1 . . . .       1 1 1 . . .       1 1 . . . .       1 1 . . . .
    text 1    1 1 1 . . .       1 1 1 . . .       1 1 1 . . .       1 1 1 . . .
    text 2    . . . 1 . .       . . . 1 1 .       . . . 1 1 .       . . . 1 . .
    text 2    . . . 1 1 .       . . . 1 1 .       . . . 1 1 .       . . . 1 1 .
    padding   . . . . . 1       . . . . . 1       . . . . . 1       . . . . . 1

Padding (segment 0) sees padding, so that no row of a softmax is empty.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Bool


@flax.struct.dataclass
class TokenInfo:
    """Where the tokens of packed rows stand, [..., T] each.

    segment: their text in the row, 0 for padding; position: counted from 0 in the text; in_text: not of the instruction.
    """

    segment: Any
    position: Any
    in_text: Any


@dataclasses.dataclass(frozen=True)
class Mask:
    """`causal`: a token sees only earlier ones and itself; otherwise later ones too.

    `instruction_causal` says so of the instruction's tokens, where they differ from the text's: each part is then causal
    or bidirectional within itself, and the text sees the instruction before it (the per-part choices of GRIT, Muennighoff
    et al. 2024, figure 3).
    """

    causal: bool
    instruction_causal: bool | None = None

    def allows(self, query: TokenInfo, key: TokenInfo, window: jax.Array | int | None = None) -> jax.Array:
        """Whether the token at `query` sees the one at `key`; broadcasts.

        Only near tokens are seen in a `window` of w, counted as transformers counts: where all look back only, the token
        itself and w - 1 before it; otherwise w to either side.
        """
        ahead = query.position - key.position
        seen = ahead >= 0
        if self.instruction_causal is None:
            seen = seen if self.causal else ahead == ahead
        elif self.causal != self.instruction_causal:
            looks_ahead = query.in_text if self.instruction_causal else ~query.in_text
            seen = seen | (looks_ahead & (query.in_text == key.in_text))
        if window is None:
            return seen
        return seen & (ahead < window if self == CAUSAL else abs(ahead) <= window)


CAUSAL = Mask(causal=True)
BIDIRECTIONAL = Mask(causal=False)
MASKS = {
    "causal": CAUSAL,
    "bidirectional": BIDIRECTIONAL,
    "prefix": Mask(causal=False, instruction_causal=True),
    "prefix_lm": Mask(causal=True, instruction_causal=False),
}


def visible(mask: Mask, places: TokenInfo, window: jax.Array | int | None = None) -> Bool[Array, "*r t t"]:
    """[..., query, key]: True where the query token sees the key token."""
    query, key = (jax.tree.map(lambda x: x[..., :, None], places), jax.tree.map(lambda x: x[..., None, :], places))
    return (query.segment == key.segment) & mask.allows(query, key, window)
