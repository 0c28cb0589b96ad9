"""Which texts of a global batch are no negatives of which, from what is known of each text and from scores of pairs."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jaxembed.data.batch import Batch


@flax.struct.dataclass
class Texts:
    """What the masks know of texts, with any leading axes. `guide` are vectors by a guide model, of width 0 without one."""

    owner: Any  # int [...]: the query of the batch that the text belongs to, or is
    present: Any  # bool [...]
    text_hash: Any  # uint32 [..., 2]
    query_hash: Any  # uint32 [..., 2], of the owner
    positive_hash: Any  # uint32 [..., P, 2]: known positives of the owner, zero where absent
    in_batch: Any  # bool [...]
    label: Any  # int [...], -1 for none
    source: Any  # int [...]
    guide: Any  # float [..., G]

    def reshape(self, *shape: int) -> Texts:
        """The same with other leading axes."""
        leading, shape = self.owner.ndim, self.owner.reshape(shape).shape
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[leading:]), self)


def query_texts(batch: Batch) -> Texts:
    """[B] of the queries."""
    count = batch.query_slot.shape[0]
    guide = jnp.zeros((count, 0)) if batch.guide is None else batch.guide.queries
    return Texts(
        jnp.arange(count), jnp.ones(count, bool), batch.query_hash, batch.query_hash, batch.positive_hash, batch.in_batch,
        batch.label, batch.source, guide,
    )  # fmt: skip


def document_texts(batch: Batch) -> Texts:
    """[B, 1+K] of the documents, the positive first. The known positives of the owner stand with the queries alone."""
    shape = batch.doc_slot.shape
    own = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (*shape, *x.shape[1:])), query_texts(batch))
    guide = jnp.zeros((*shape, 0)) if batch.guide is None else batch.guide.documents
    hashes = own.positive_hash[..., :0, :]
    return own.replace(present=batch.doc_slot >= 0, text_hash=batch.doc_hash, positive_hash=hashes, guide=guide)


def same_hash(a: UInt32[Array, "*#x 2"], b: UInt32[Array, "*#x 2"]) -> jax.Array:
    """Whether two texts are equal, by their hashes; broadcasts."""
    return (a[..., 0] == b[..., 0]) & (a[..., 1] == b[..., 1])


def known_positive(anchors: Texts, others: Texts) -> jax.Array:
    """Whether one of two texts is a known positive of the other's query; leading axes broadcast."""
    pairs = [same_hash(anchors.positive_hash[..., p, :], others.text_hash) for p in range(anchors.positive_hash.shape[-2])]
    pairs += [same_hash(others.positive_hash[..., p, :], anchors.text_hash) for p in range(others.positive_hash.shape[-2])]
    return functools.reduce(operator.or_, pairs)


def lent(anchors: Texts, others: Texts) -> jax.Array:
    """Whether a text of another query may be a negative: both sources use in-batch negatives and the queries differ."""
    apart = (anchors.owner != others.owner) & ~same_hash(anchors.query_hash, others.query_hash)
    return anchors.in_batch & others.in_batch & apart


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
            nearest = guide_positive * (1 - self.guide_margin) if self.guide_relative else guide_positive - self.guide_margin
            found |= guide_scores > nearest
        return found
