"""Which documents of a global batch are negatives of which query, from per-text metadata alone."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from jaxembed.data.batch import Batch


def same_hash(a: UInt32[Array, "*#x 2"], b: UInt32[Array, "*#x 2"]) -> jax.Array:
    """Whether two texts are equal, by their hashes; broadcasts."""
    return (a[..., 0] == b[..., 0]) & (a[..., 1] == b[..., 1])


def negative_mask(batch: Batch) -> Bool[Array, "b n"]:
    """[B, N] over the N = B(1+K) documents, query-major: True where the document is a negative of the query.

    A query's own documents past the first are; other queries' documents are where both sources use in-batch negatives
    and the two queries differ. A document whose text is one of the query's positives never is, nor an absent one.
    """
    queries, per_query = batch.doc_slot.shape
    owner = jnp.repeat(jnp.arange(queries), per_query)
    own = owner == jnp.arange(queries)[:, None]
    hard = jnp.tile(jnp.arange(per_query) > 0, queries)
    lent = batch.in_batch[:, None] & batch.in_batch[owner]
    same_query = same_hash(batch.query_hash[:, None], batch.query_hash[owner])
    documents = batch.doc_hash.reshape(-1, 2)
    positive = functools.reduce(
        operator.or_,
        [same_hash(batch.positive_hash[:, None, p], documents) for p in range(batch.positive_hash.shape[1])],
    )
    present = batch.doc_slot.reshape(-1) >= 0
    return jnp.where(own, hard, lent & ~same_query) & present & ~positive
