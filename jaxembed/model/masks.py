"""Attention masks as values: who may look at whom inside one text.

A mask answers from the positions of two tokens of the same text. `visible` combines it with the segment ids of packed
rows, the only place where the two meet:

    segments 1 1 2 2 0, causal      bidirectional
             1 . . . .              1 1 . . .
             1 1 . . .              1 1 . . .
             . . 1 . .              . . 1 1 .
             . . 1 1 .              . . 1 1 .
             . . . . 1              . . . . 1

Padding (segment 0) sees padding, so that no row of a softmax is empty.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Mask:
    """`causal`: only earlier tokens and itself. `window`: only near tokens, counted as transformers counts.

    A causal window of w sees itself and w - 1 tokens back; a bidirectional one sees w tokens to either side.
    """

    causal: bool
    window: int | None = None

    def allows(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether the token at position `query` sees the one at position `key`; broadcasts."""
        ahead = query - key
        seen = ahead >= 0 if self.causal else ahead == ahead
        if self.window is None:
            return seen
        near = ahead < self.window if self.causal else abs(ahead) <= self.window
        return seen & near


CAUSAL = Mask(causal=True)
BIDIRECTIONAL = Mask(causal=False)
MASKS = {"causal": CAUSAL, "bidirectional": BIDIRECTIONAL}


def visible(mask: Mask, segment_ids: Int[Array, "*r t"], positions: Int[Array, "*r t"]) -> Bool[Array, "*r t t"]:
    """[..., query, key]: True where the query token sees the key token."""
    same_text = segment_ids[..., :, None] == segment_ids[..., None, :]
    return same_text & mask.allows(positions[..., :, None], positions[..., None, :])
