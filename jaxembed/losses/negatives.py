"""Which texts of a global batch are no negatives of which, from what is known of each text and from scores of pairs."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from jaxembed.data.batch import Batch


@flax.struct.dataclass
class Texts:
    """What the masks know of texts, with any leading axes. A text is its hash, zero where absent.

    `guide` are vectors by a guide model, of width 0 without one.
    """

    text: Any  # uint32 [..., 2]
    query: Any  # uint32 [..., 2]: the query that the text belongs to, or is
    positives: Any  # uint32 [..., P, 2]: all known positives of that query
    in_batch: Any  # bool [...]: present, of a source that uses in-batch negatives
    present: Any  # bool [...]
    label: Any  # int [...], -1 for none
    source: Any  # int [...]
    guide: Any  # float [..., G]

    def reshape(self, *shape: int) -> Texts:
        """The same with other leading axes."""
        leading, shape = self.in_batch.ndim, self.in_batch.reshape(shape).shape
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[leading:]), self)


def texts_of(batch: Batch) -> tuple[Texts, Texts]:
    """The queries [B] and the documents [B, 1+K] of a batch. The known positives of a query stand with the query alone."""
    query, shape, present = batch.query_hash, batch.doc_slot.shape, batch.doc_slot >= 0
    guide = jnp.zeros((len(query), 0)) if batch.guide is None else batch.guide.queries
    everywhere = jnp.ones_like(batch.in_batch)
    queries = Texts(query, query, batch.positive_hash, batch.in_batch, everywhere, batch.label, batch.source, guide)
    own = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (*shape, *x.shape[1:])), queries)
    guide = jnp.zeros((*shape, 0)) if batch.guide is None else batch.guide.documents
    documents = own.replace(
        text=batch.doc_hash, positives=own.positives[..., :0, :], in_batch=own.in_batch & present, present=present
    )
    return queries, documents.replace(guide=guide)


def same(a: UInt32[Array, "*#n 2"], b: UInt32[Array, "*#n 2"]) -> Bool[Array, "*n"]:
    """Whether two texts are equal; leading axes broadcast."""
    return (a[..., 0] == b[..., 0]) & (a[..., 1] == b[..., 1])


def known_positive(anchors: Texts, others: Texts) -> jax.Array:
    """Whether one of two texts is a known positive of the other's query; leading axes broadcast."""
    pairs = [same(anchors.positives[..., p, :], others.text) for p in range(anchors.positives.shape[-2])]
    pairs += [same(others.positives[..., p, :], anchors.text) for p in range(others.positives.shape[-2])]
    return functools.reduce(operator.or_, pairs)


def in_batch_candidates(anchors: Texts, others: Texts) -> jax.Array:
    """Whether a text is there that belongs to another query and may be a negative: both sources use in-batch negatives."""
    return anchors.in_batch & others.in_batch & ~same(anchors.query, others.query)


@dataclasses.dataclass(frozen=True)
class FalseNegatives:
    """Tells texts that are likely positives after all, beside the known ones.

    same_label: of a query with the same label of the same source. margin: the score is above the positive's by more than
    that (Qwen3-Embedding, arXiv:2506.05176, equation 1: 0.1). guided: a guide model scores it above the positive, less a
    margin, absolute or relative to the positive's score (GISTEmbed, arXiv:2402.16829).
    """

    same_label: bool = False
    margin: float | None = None
    guided: bool = False
    guide_margin: float = 0.0
    guide_relative: bool = False

    def __call__(
        self,
        anchors: Texts,
        others: Texts,
        scores: jax.Array,
        guide_scores: jax.Array | None,
        positive: jax.Array,
        guide_positive: jax.Array,
    ) -> jax.Array:
        """Leading axes broadcast; `positive` are the scores of the anchors' own pairs, `guide_` those of the guide."""
        found = known_positive(anchors, others)
        if self.same_label:
            found |= (anchors.label >= 0) & (anchors.label == others.label) & (anchors.source == others.source)
        if self.margin is not None:
            found |= scores > positive + self.margin
        if self.guided:
            assert guide_scores is not None
            unit = jnp.abs(guide_positive) if self.guide_relative else 1.0
            found |= guide_scores > guide_positive - self.guide_margin * unit
        return found
