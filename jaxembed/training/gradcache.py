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

    Each device sums the gradients of its own chunks before they are summed over devices, once, unless the parameters are split
    too (`parallel.by_shard`).
    """
    if rows is None or rows * texts.shards >= len(texts.tokens):
        return model.apply({"params": params}, texts, rngs={"dropout": key})
    parts = parallel.parts_by_shard()
    shards = texts.shards // parts  # of a part
    count = -(-len(texts.tokens) // (texts.shards * rows))
    keys = jax.random.split(key, (parts, count))
    arrays = {
        "tokens": texts.tokens,
        "segment_ids": texts.segment_ids,
        "positions": texts.positions,
        "pool_mask": texts.pool_mask,
    }

    def of_part(params: Any, arrays: dict[str, jax.Array], keys: jax.Array) -> jax.Array:
        def chunk(part: tuple[dict[str, jax.Array], jax.Array]) -> jax.Array:
            packed = PackedTexts(**part[0], segments=texts.segments, shards=shards)
            return model.apply({"params": params}, packed, rngs={"dropout": part[1]})

        chunks = jax.tree.map(lambda x: _in_chunks(x, shards, count, rows), arrays)
        vectors = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), (chunks, keys[0]))
        return _in_order(vectors, shards, rows, len(arrays["tokens"]))

    return parallel.by_shard(of_part)(params, arrays, keys)


def _in_chunks(x: jax.Array, shards: int, count: int, rows: int) -> jax.Array:
    """[count, shards * rows, ...]: each chunk has rows of every shard, so that all devices work; zeros behind the last."""
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    padded = jnp.pad(by_shard, [(0, 0), (0, count * rows - by_shard.shape[1]), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(shards, count, rows, *x.shape[1:]).swapaxes(0, 1).reshape(count, shards * rows, *x.shape[1:])


def _in_order(x: jax.Array, shards: int, rows: int, present: int) -> jax.Array:
    """What `_in_chunks` made, [count, shards * rows, ...], as it was, [present, ...]."""
    by_shard = x.reshape(len(x), shards, rows, *x.shape[2:]).swapaxes(0, 1).reshape(shards, len(x) * rows, *x.shape[2:])
    return by_shard[:, : present // shards].reshape(present, *x.shape[2:])
