"""Encoding a batch some rows at a time, so that memory holds the activations of those rows alone.

Gradient caching (Gao et al. 2021, arXiv:2101.06983) as JAX says it: a loop over chunks of rows whose body is recomputed in
the backward pass. The loss sees the vectors of the whole batch, so values and gradients are those of one large step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed import parallel
from jaxembed.data.packing import PackedTexts
from jaxembed.model.embedder import EmbeddingModel


def encode(model: EmbeddingModel, params: Any, texts: PackedTexts, key: jax.Array, rows: int | None) -> Float[Array, "r s d"]:
    """The vectors of a batch; with `rows` every device encodes that many rows at a time. `key` is that of dropout.

    Each device sums the gradients of its own chunks before they are summed over devices, once.
    """
    if rows is None or rows * texts.shards >= len(texts.tokens):
        return model.apply({"params": params}, texts, rngs={"dropout": key})
    count = -(-len(texts.tokens) // (texts.shards * rows))
    keys = jax.random.split(key, (texts.shards, count))
    arrays = {
        "tokens": texts.tokens,
        "segment_ids": texts.segment_ids,
        "positions": texts.positions,
        "pool_mask": texts.pool_mask,
    }

    def of_shard(params: Any, arrays: dict[str, jax.Array], keys: jax.Array) -> jax.Array:
        def chunk(part: tuple[dict[str, jax.Array], jax.Array]) -> jax.Array:
            packed = PackedTexts(**part[0], segments=texts.segments, shards=1)
            return model.apply({"params": params}, packed, rngs={"dropout": part[1]})

        present = len(arrays["tokens"])
        padded = jax.tree.map(lambda x: jnp.pad(x, [(0, count * rows - present), (0, 0)]), arrays)
        chunks = jax.tree.map(lambda x: x.reshape(count, rows, -1), padded)
        vectors = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), (chunks, keys[0]))
        return vectors.reshape(count * rows, *vectors.shape[2:])[:present]

    return parallel.by_shard(of_shard)(params, arrays, keys)
