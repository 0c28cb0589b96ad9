"""Rules that decide which texts of a global batch are negatives of an anchor, from their metadata and scores."""

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
class TextInfo:
    """Metadata of texts for the negative rules, with any leading axes. The hash of an absent text is zero.

    Attributes:
        text_hash: Hash of the text, uint32 [..., 2].
        query_hash: Hash of the query that the text is or belongs to, uint32 [..., 2].
        positive_hashes: Hashes of all known positives of that query, and of the query itself, uint32 [..., P, 2].
        in_batch: True if the text is present and its source uses in-batch negatives, bool [...].
        is_present: False for absent documents, bool [...].
        label: Label in its source, -1 for none, int [...].
        source: Index of the source, int [...].
        guide: Vectors of the guide model, float [..., G]; G is 0 without one.
    """

    text_hash: Any
    query_hash: Any
    positive_hashes: Any
    in_batch: Any
    is_present: Any
    label: Any
    source: Any
    guide: Any

    def reshape(self, *shape: int) -> TextInfo:
        """Return the same texts with other leading axes."""
        leading, shape = self.in_batch.ndim, self.in_batch.reshape(shape).shape
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[leading:]), self)


def collect_text_info(batch: Batch) -> tuple[TextInfo, TextInfo]:
    """Return the metadata of the queries [B] and of the documents [B, 1+K] of a batch.

    The known positives of a query are stored with the query only; the documents have none (P = 0).
    """
    query, shape, is_present = batch.query_hash, batch.doc_slot.shape, batch.doc_slot >= 0
    query_guide = jnp.zeros((len(query), 0)) if batch.guide is None else batch.guide.queries
    document_guide = jnp.zeros((*shape, 0)) if batch.guide is None else batch.guide.documents
    queries = TextInfo(
        text_hash=query, query_hash=query, positive_hashes=batch.positive_hash, in_batch=batch.in_batch,
        is_present=jnp.ones_like(batch.in_batch), label=batch.label, source=batch.source, guide=query_guide,
    )  # fmt: skip
    documents = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (*shape, *x.shape[1:])), queries)
    documents = documents.replace(
        text_hash=batch.doc_hash, positive_hashes=documents.positive_hashes[..., :0, :],
        in_batch=documents.in_batch & is_present, is_present=is_present, guide=document_guide,
    )  # fmt: skip
    return queries, documents


def is_same_text(a: UInt32[Array, "*#n 2"], b: UInt32[Array, "*#n 2"]) -> Bool[Array, "*n"]:
    """Return True where two hashes are equal. Leading axes broadcast."""
    return (a[..., 0] == b[..., 0]) & (a[..., 1] == b[..., 1])


def is_known_positive(anchors: TextInfo, candidates: TextInfo) -> jax.Array:
    """Return True where one of two texts is a known positive of the other's query. Leading axes broadcast."""
    matches = [
        is_same_text(a.positive_hashes[..., p, :], b.text_hash)
        for a, b in ((anchors, candidates), (candidates, anchors))
        for p in range(a.positive_hashes.shape[-2])
    ]
    return functools.reduce(operator.or_, matches)


def in_batch_candidates(anchors: TextInfo, candidates: TextInfo) -> jax.Array:
    """Return True where a candidate may be an in-batch negative of an anchor. Leading axes broadcast.

    It must belong to another query, and the sources of both must use in-batch negatives.
    """
    return anchors.in_batch & candidates.in_batch & ~is_same_text(anchors.query_hash, candidates.query_hash)


@dataclasses.dataclass(frozen=True)
class FalseNegativeRule:
    """Rule for the candidates that must not count as negatives: known positives, and those that are probably positives.

    Attributes:
        mask_same_label: Drop texts of queries with the same label in the same source.
        margin: Drop texts whose score exceeds the positive's by more than this (Qwen3-Embedding, arXiv:2506.05176,
            equation 1: 0.1). None: keep them.
        is_guided: Drop texts whose guide score exceeds the positive's guide score minus `guide_margin` (GISTEmbed,
            arXiv:2402.16829).
        guide_margin: Margin between guide scores.
        is_guide_margin_relative: Whether `guide_margin` is multiplied by the guide's score of the positive.
    """

    mask_same_label: bool = False
    margin: float | None = None
    is_guided: bool = False
    guide_margin: float = 0.0
    is_guide_margin_relative: bool = False

    def __call__(
        self,
        anchors: TextInfo,
        candidates: TextInfo,
        scores: jax.Array,
        guide_scores: jax.Array | None,
        positive_scores: jax.Array,
        guide_positive_scores: jax.Array,
    ) -> jax.Array:
        """Return True where a candidate is a known or a probable positive of an anchor. Leading axes broadcast.

        Args:
            anchors: Texts that need negatives.
            candidates: Their possible negatives.
            scores: Scores of the pairs (anchor, candidate).
            guide_scores: The guide model's scores of these pairs; None without a guide.
            positive_scores: Score of each anchor with its own positive (or query).
            guide_positive_scores: The guide model's scores of these pairs.
        """
        is_positive = is_known_positive(anchors, candidates)
        if self.mask_same_label:
            same_label = (anchors.label >= 0) & (anchors.label == candidates.label)
            is_positive |= same_label & (anchors.source == candidates.source)
        if self.margin is not None:
            is_positive |= scores > positive_scores + self.margin
        if self.is_guided:
            assert guide_scores is not None
            margin_unit = jnp.abs(guide_positive_scores) if self.is_guide_margin_relative else 1.0
            is_positive |= guide_scores > guide_positive_scores - self.guide_margin * margin_unit
        return is_positive
