"""Attention masks as values: which tokens of a text see each other.

A `Mask` decides whether one token sees another of the same text, from their positions. Only `materialize_mask` combines it with
the segments of packed rows. The matrices below have a row for each query token and a column for each key token (1: the
query sees the key). The row of tokens holds a text of three tokens whose first two are its instruction, a text of two tokens
without instruction, and one token of padding:

    causal         bidirectional  prefix         prefix_lm
    1 0 0 0 0 0    1 1 1 0 0 0    1 0 0 0 0 0    1 1 0 0 0 0    text 1, instruction
    1 1 0 0 0 0    1 1 1 0 0 0    1 1 0 0 0 0    1 1 0 0 0 0    text 1, instruction
    1 1 1 0 0 0    1 1 1 0 0 0    1 1 1 0 0 0    1 1 1 0 0 0    text 1
    0 0 0 1 0 0    0 0 0 1 1 0    0 0 0 1 1 0    0 0 0 1 0 0    text 2
    0 0 0 1 1 0    0 0 0 1 1 0    0 0 0 1 1 0    0 0 0 1 1 0    text 2
    0 0 0 0 0 1    0 0 0 0 0 1    0 0 0 0 0 1    0 0 0 0 0 1    padding

Padding tokens (segment 0) see each other, so that no softmax is over an empty set.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Bool


@flax.struct.dataclass
class TokenInfo:
    """Segments, positions and parts of the tokens of packed rows, [..., T] each, from which masks are computed.

    Attributes:
        segment: Index of the token's text in its row, counted from 1; 0 for padding.
        position: Position in the text, counted from 0.
        in_text: True for tokens of the text itself (of its second copy with an echo), False for those before it.
    """

    segment: Any
    position: Any
    in_text: Any


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which tokens of one text see each other.

    The settings for text and instruction may differ. Each part is then causal or bidirectional within itself, and the text
    sees the instruction before it (GRIT, Muennighoff et al. 2024, arXiv:2402.09906, figure 3).

    Attributes:
        causal: Whether a token sees only itself and earlier tokens. Otherwise it sees later ones too.
        instruction_causal: The same for the tokens of the instruction. None: as `causal`.
    """

    causal: bool
    instruction_causal: bool | None = None

    def allows(self, query: TokenInfo, key: TokenInfo, window: jax.Array | int | None = None) -> jax.Array:
        """Return True where the token `query` sees the token `key` of the same text. Their shapes broadcast.

        Args:
            query: Query tokens.
            key: Key tokens.
            window: Sliding window w, counted as in transformers. With the causal mask a token sees itself and the w - 1
                tokens before it; with other masks, w tokens to either side. A text of three tokens:

                    causal, w = 2    bidirectional, w = 1
                    1 0 0            1 1 0
                    1 1 0            1 1 1
                    0 1 1            0 1 1
        """
        distance = query.position - key.position
        seen = distance >= 0
        if self.instruction_causal is None:
            seen = seen if self.causal else distance == distance  # all True, in the broadcast shape
        elif self.causal != self.instruction_causal:
            # One of the two parts is bidirectional: its tokens see later tokens of the same part too.
            is_bidirectional = query.in_text if self.instruction_causal else ~query.in_text
            seen = seen | (is_bidirectional & (query.in_text == key.in_text))
        if window is None:
            return seen
        return seen & (distance < window if self == CAUSAL else abs(distance) <= window)


CAUSAL = Mask(causal=True)
BIDIRECTIONAL = Mask(causal=False)
MASKS = {
    "causal": CAUSAL,
    "bidirectional": BIDIRECTIONAL,
    "prefix": Mask(causal=False, instruction_causal=True),
    "prefix_lm": Mask(causal=True, instruction_causal=False),
}


def materialize_mask(mask: Mask, token_info: TokenInfo, window: jax.Array | int | None = None) -> Bool[Array, "*r t t"]:
    """Return the mask of packed rows, [..., query, key]: True where the query token sees the key token."""
    query = jax.tree.map(lambda x: x[..., :, None], token_info)
    key = jax.tree.map(lambda x: x[..., None, :], token_info)
    return (query.segment == key.segment) & mask.allows(query, key, window)
