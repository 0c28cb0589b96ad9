"""Batches for losses, built from short texts and random vectors."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxembed.data.batch import Batch
from jaxembed.data.equality import hash_text
from jaxembed.losses.encoded import EncodedBatch

TextRows = list[list[str | None]]
ALL_DIRECTIONS = ("query_document", "query_query", "document_query", "document_document")


def make_batch(queries: list[str], documents: TextRows, in_batch: list[bool] | None = None, positives: Any = None) -> Batch:
    """Build a batch of these texts; None is an absent document. By default a query's only positive is its first document."""
    positives = positives or [[row[0]] for row in documents]
    width = max(3, *(len(texts) for texts in positives))
    zero = np.zeros(2, np.uint32)
    hashes = [[hash_text(text) if text is not None else zero for text in row] for row in documents]
    known = [[*map(hash_text, texts), *[zero] * (width - len(texts))] for texts in positives]
    b = len(queries)
    batch = Batch(
        texts=None,
        query_slot=np.arange(b),
        doc_slot=np.array([[-1 if text is None else 0 for text in row] for row in documents]),
        in_batch=np.array(in_batch or [True] * b),
        query_hash=np.array([hash_text(text) for text in queries]),
        doc_hash=np.array(hashes),
        positive_hash=np.array(known),
        label=np.full(b, -1),
        source=np.zeros(b, np.int32),
        teacher_scores=np.full((b, len(documents[0])), np.nan, np.float32),
        score=np.full(b, np.nan, np.float32),
        is_positive=np.ones(b, bool),
    )
    return jax.device_put(batch)


def draw_unit_vectors(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw float64 vectors of length 1 along the last axis."""
    x = random.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_encoded(q: jax.Array, d: jax.Array, batch: Batch, shards: int = 1, **options: Any) -> EncodedBatch:
    """Build the input of an objective that applies to all queries, with equal weights."""
    weights = jax.device_put(np.full(len(q), 1 / len(q), q.dtype))
    return EncodedBatch(q, d, batch, weights, jax.random.key(0), shards, **options)
