"""Encoding a batch some rows at a time, so that memory holds the activations of those rows alone.

Gradient caching (Gao et al. 2021, arXiv:2101.06983) as JAX says it: a loop over chunks of rows whose body is recomputed in
the backward pass. The loss sees the vectors of the whole batch, so values and gradients are those of one large step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.data.packing import PackedTexts
from jaxembed.devices.collectives import map_over_shards, shard_map_size, shard_rows
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.layers import unit_length


def encode(
    model: EmbeddingModel, params: Any, texts: PackedTexts, slots: Int[Array, "b m"], key: jax.Array, rows: int | None
) -> Float[Array, "b m d"]:
    """Unit vectors of the texts in shard-local `slots`, shard-major; zeros, without gradient, for absent ones (-1).

    With `rows` every device encodes that many rows at a time. `key` is that of dropout. Each device sums the gradients of its
    own chunks before they are summed over devices, once, unless the parameters are split too (`map_over_shards`).
    """
    if rows is None or rows * texts.shards >= len(texts.tokens):
        return pick(model.apply({"params": params}, texts, rngs={"dropout": key}), slots, texts.shards)
    parts = shard_map_size()
    shards = texts.shards // parts  # of a part
    count = -(-len(texts.tokens) // (texts.shards * rows))
    keys = jax.random.split(key, (parts, count))
    arrays = {
        "tokens": texts.tokens,
        "segment_ids": texts.segment_ids,
        "positions": texts.positions,
        "pool_mask": texts.pool_mask,
    }

    def of_part(params: Any, arrays: dict[str, jax.Array], slots: jax.Array, keys: jax.Array) -> jax.Array:
        def chunk(part: tuple[dict[str, jax.Array], jax.Array]) -> jax.Array:
            packed = PackedTexts(**part[0], segments=texts.segments, shards=shards)
            return model.apply({"params": params}, packed, rngs={"dropout": part[1]})

        def add(made: jax.Array, part: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            vectors = jax.checkpoint(chunk, prevent_cse=False)(part[0]).reshape(shards, -1, made.shape[-1])
            made = jax.vmap(lambda made, texts, new: made.at[texts].add(new, mode="drop"))(made, part[1], vectors)
            return shard_rows(made), None

        chunks = jax.tree.map(lambda x: _in_chunks(x, shards, count, rows), arrays), keys[0]
        vector = jax.eval_shape(chunk, jax.tree.map(lambda x: x[0], chunks))
        none = jnp.zeros((shards, slots.size // shards, vector.shape[-1]), vector.dtype)
        made, _ = jax.lax.scan(add, shard_rows(none), (chunks, _texts_in(slots, shards, count, rows * texts.segments)))
        return unit_length(made).reshape(*slots.shape, -1)

    return map_over_shards(of_part)(params, arrays, slots, keys)


def pick(vectors: Float[Array, "r s d"], slots: Int[Array, "b *m"], shards: int) -> Float[Array, "b *m d"]:
    """The unit vectors in shard-local `slots` of encoded rows, as `encode` gives them."""
    by_shard = vectors.reshape(shards, -1, vectors.shape[-1])
    local = slots.reshape(shards, -1, *slots.shape[1:])
    picked = jax.vmap(lambda v, s: v[jnp.maximum(s, 0)])(by_shard, local).reshape(*slots.shape, -1)
    return unit_length(jnp.where(slots[..., None] >= 0, picked, 0.0))


def _texts_in(slots: jax.Array, shards: int, count: int, size: int) -> Int[Array, "c s t"]:
    """Which of its shard's texts each slot of each chunk holds; a number that no text has where it holds none."""
    local = slots.reshape(shards, -1)
    absent, texts = count * size, local.shape[1]
    none = jnp.full((shards, count * size), texts, jnp.int32)
    filled = jax.vmap(lambda none, at: none.at[at].set(jnp.arange(texts, dtype=jnp.int32), mode="drop"))
    return filled(none, jnp.where(local < 0, absent, local)).reshape(shards, count, size).swapaxes(0, 1)


def _in_chunks(x: jax.Array, shards: int, count: int, rows: int) -> jax.Array:
    """[count, shards * rows, ...]: each chunk has rows of every shard, so that all devices work; zeros behind the last."""
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    padded = jnp.pad(by_shard, [(0, 0), (0, count * rows - by_shard.shape[1]), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(shards, count, rows, *x.shape[1:]).swapaxes(0, 1).reshape(count, shards * rows, *x.shape[1:])
