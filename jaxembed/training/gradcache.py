"""Gradient caching: encode a batch in chunks of rows, so that memory holds the activations of one chunk only.

Gao et al. 2021, arXiv:2101.06983. In JAX it is a loop over chunks whose body is recomputed in the backward pass
(`jax.checkpoint` in `jax.lax.scan`). The loss sees the vectors of the whole batch, so values and gradients are those of one
large step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.data.packing import PackedTexts
from jaxembed.data.token_batch import TokenBatch
from jaxembed.devices.collectives import count_map_shards, map_over_shards, shard_rows
from jaxembed.model.embedder import EmbeddingModel, make_transformer
from jaxembed.model.layers import l2_normalize
from jaxembed.model.masks import Mask


def encode(
    model: EmbeddingModel,
    params: Any,
    texts: PackedTexts,
    slots: Int[Array, "b m"],
    key: jax.Array,
    chunk_rows: int | None,
    exit_layers: Int[Array, " e"] | None = None,
    *,
    recompute: bool = True,
) -> Float[Array, "b m *x d"]:
    """Encode the texts in the given slots as unit vectors. It has eight parameters because a step chooses each of them.

    Each device sums the gradients of its own chunks. They are summed over devices once, after the loop, unless the parameters
    are sharded too (`map_over_shards`).

    Args:
        model: The model.
        params: Its parameters.
        texts: The packed texts of a batch.
        slots: Shard-local slots of texts, shard-major [B, M]; -1 for an absent text.
        key: Random key of dropout.
        chunk_rows: Rows that each device encodes at a time; None for all.
        exit_layers: Numbers of layers after which vectors are also returned (early exits).
        recompute: Whether chunks are encoded again in the backward pass. Otherwise the activations of all chunks are kept.

    Returns:
        Unit vectors [B, M, D]; with exits [B, M, 1+E, D], the whole model first. Absent texts have zeros, without
        gradient.
    """
    # With exits, every text has several consecutive slots.
    slots_per_text = 1
    if exit_layers is not None:
        slots_per_text = 1 + len(exit_layers)
        slots = jnp.where(slots < 0, -1, slots * slots_per_text)[..., None]
        slots = jnp.where(slots < 0, -1, slots + jnp.arange(slots_per_text, dtype=slots.dtype))

    def apply(params_and_layers: Any, packed: PackedTexts, dropout_key: jax.Array) -> Float[Array, "r s d"]:
        params, layers = params_and_layers
        vectors = model.apply({"params": params}, packed, exit_layers=layers, rngs={"dropout": dropout_key})
        return jnp.reshape(vectors, (len(packed.tokens), -1, vectors.shape[-1]))

    # Without chunks: encode all rows, then gather the vectors.
    if chunk_rows is None or chunk_rows * texts.shards >= len(texts.tokens):
        return gather_vectors(apply((params, exit_layers), texts, key), slots, texts.shards)
    shards, chunks, keys = _plan_chunks(texts, chunk_rows, key)

    def encode_part(params: Any, row_arrays: dict[str, jax.Array], slots: jax.Array, keys: jax.Array) -> jax.Array:
        def encode_chunk(chunk: tuple[dict[str, jax.Array], jax.Array]) -> jax.Array:
            arrays, chunk_key = chunk
            return apply(params, PackedTexts(**arrays, segments=texts.segments, shards=shards), chunk_key)

        def add_chunk(sums: jax.Array, inputs: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            chunk, text_indices = inputs
            # Encode. Usually the chunk is encoded again in the backward pass instead of keeping its activations.
            run = jax.checkpoint(encode_chunk, prevent_cse=False) if recompute else encode_chunk
            vectors = run(chunk).reshape(shards, -1, sums.shape[-1])
            # Add each slot's vector to its text's row. Empty slots have an index out of bounds, and are dropped.
            add = jax.vmap(lambda sums, indices, new: sums.at[indices].add(new, mode="drop"))
            return shard_rows(add(sums, text_indices, vectors)), None

        # Split the rows into chunks, and find the text in each slot of a chunk. `keys` are [1, chunks] here.
        inputs = jax.tree.map(lambda x: _split_into_chunks(x, shards, chunks, chunk_rows), row_arrays), keys[0]
        text_indices = _find_texts_in_slots(slots, shards, chunks, chunk_rows * texts.segments * slots_per_text)
        # Loop over the chunks. Every text is in one chunk only, so the sums are the vectors.
        vector = jax.eval_shape(encode_chunk, jax.tree.map(lambda x: x[0], inputs))
        zeros = jnp.zeros((shards, slots.size // shards, vector.shape[-1]), vector.dtype)
        sums, _ = jax.lax.scan(add_chunk, shard_rows(zeros), (inputs, text_indices))
        return l2_normalize(sums).reshape(*slots.shape, -1)

    return map_over_shards(encode_part)((params, exit_layers), _get_row_arrays(texts), slots, keys)


def encode_tokens(
    model: EmbeddingModel, mask: Mask, params: Any, batch: TokenBatch, key: jax.Array, chunk_rows: int | None,
    *, recompute: bool = True,
) -> Float[Array, "n p d"]:  # fmt: skip
    """Return the hidden states that predict tokens. It has seven parameters because a step chooses each of them.

    Args:
        model: The model, whose transformer runs.
        mask: Which tokens of a text see each other.
        params: The parameters of the model.
        batch: Texts, and the positions whose hidden states are returned.
        key: Random key of dropout.
        chunk_rows: Rows that each device encodes at a time; None for all.
        recompute: Whether chunks are encoded again in the backward pass.

    Returns:
        Hidden states after the last norm, for n shards, in the dtype of the computation.
    """
    texts, transformer = batch.texts, make_transformer(model, mask)

    def encode_rows(params: Any, arrays: dict[str, jax.Array], key: jax.Array, shards: int) -> jax.Array:
        packed = PackedTexts(**arrays, segments=texts.segments, shards=shards)
        return transformer.apply({"params": params["decoder"]}, packed, rngs={"dropout": key})

    def gather(hidden: jax.Array) -> jax.Array:
        shard_hidden = hidden.reshape(texts.shards, -1, hidden.shape[-1])
        return jax.vmap(lambda states, positions: states[positions])(shard_hidden, batch.position)

    # Without chunks: all rows at once.
    if chunk_rows is None or chunk_rows * texts.shards >= len(texts.tokens):
        return gather(encode_rows(params, _get_row_arrays(texts), key, texts.shards))
    # With chunks: loop over chunks of rows of every shard, as in `encode`.
    shards, chunks, keys = _plan_chunks(texts, chunk_rows, key)

    def encode_part(params: Any, row_arrays: dict[str, jax.Array], keys: jax.Array) -> jax.Array:
        def encode_chunk(_: None, chunk: tuple[dict[str, jax.Array], jax.Array]) -> tuple[None, jax.Array]:
            run = jax.checkpoint(encode_rows, prevent_cse=False, static_argnums=3) if recompute else encode_rows
            return None, run(params, *chunk, shards)

        inputs = jax.tree.map(lambda x: _split_into_chunks(x, shards, chunks, chunk_rows), row_arrays), keys[0]
        _, hidden = jax.lax.scan(encode_chunk, None, inputs)
        return _join_chunks(hidden, shards, len(texts.tokens) // texts.shards)

    return gather(map_over_shards(encode_part)(params, _get_row_arrays(texts), keys))


def gather_vectors(vectors: Float[Array, "r s d"], slots: Int[Array, "b *m"], shards: int) -> Float[Array, "b *m d"]:
    """Return the unit vectors in the given slots of encoded rows.

    Args:
        vectors: Vectors of R rows of S slots each, shard-major.
        slots: Shard-local slots, shard-major; -1 for an absent text.
        shards: Number of shards.

    Returns:
        Unit vectors. Absent texts have zeros, without gradient.
    """
    shard_vectors = vectors.reshape(shards, -1, vectors.shape[-1])
    shard_slots = slots.reshape(shards, -1, *slots.shape[1:])
    gathered = jax.vmap(lambda v, s: v[jnp.maximum(s, 0)])(shard_vectors, shard_slots).reshape(*slots.shape, -1)
    return l2_normalize(jnp.where(slots[..., None] >= 0, gathered, 0.0))


def _find_texts_in_slots(slots: jax.Array, shards: int, chunks: int, chunk_slots: int) -> Int[Array, "c s t"]:
    """Return the text in each slot of each chunk, as an index into the texts of its shard. This inverts `slots`.

    Args:
        slots: Shard-local slot of each text, shard-major; -1 for an absent text.
        shards: Number of shards.
        chunks: Number of chunks.
        chunk_slots: Slots of one shard in one chunk.

    Returns:
        Indices [C, S, T] by chunk, shard and slot of the chunk. An empty slot has the number of texts, which is out of bounds.
    """
    shard_slots = slots.reshape(shards, -1)
    total_slots, texts = chunks * chunk_slots, shard_slots.shape[1]
    empty = jnp.full((shards, total_slots), texts, jnp.int32)
    fill = jax.vmap(lambda row, filled_slots: row.at[filled_slots].set(jnp.arange(texts, dtype=jnp.int32), mode="drop"))
    indices = fill(empty, jnp.where(shard_slots < 0, total_slots, shard_slots))  # absent texts are dropped
    return indices.reshape(shards, chunks, chunk_slots).swapaxes(0, 1)


def _get_row_arrays(texts: PackedTexts) -> dict[str, jax.Array]:
    """Return the arrays of packed texts by name."""
    return {name: getattr(texts, name) for name in ("tokens", "segment_ids", "positions", "pool_mask")}


def _plan_chunks(texts: PackedTexts, chunk_rows: int, key: jax.Array) -> tuple[int, int, jax.Array]:
    """Return the number of shards and of chunks in one part of the batch, and the dropout keys [parts, chunks].

    The parts are those that `map_over_shards` splits a batch into.
    """
    parts = count_map_shards()
    chunks = -(-len(texts.tokens) // (texts.shards * chunk_rows))
    return texts.shards // parts, chunks, jax.random.split(key, (parts, chunks))


def _split_into_chunks(x: jax.Array, shards: int, chunks: int, chunk_rows: int) -> jax.Array:
    """Split rows into chunks [chunks, shards * chunk_rows, ...], the last one padded with zeros.

    Each chunk has rows of every shard, so that all devices work on it.
    """
    shard_major = x.reshape(shards, -1, *x.shape[1:])
    padding = chunks * chunk_rows - shard_major.shape[1]
    padded = jnp.pad(shard_major, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 1)])
    chunk_major = padded.reshape(shards, chunks, chunk_rows, *x.shape[1:]).swapaxes(0, 1)
    return chunk_major.reshape(chunks, shards * chunk_rows, *x.shape[1:])


def _join_chunks(x: jax.Array, shards: int, rows: int) -> jax.Array:
    """Join chunks [chunks, shards * chunk_rows, ...] to rows [shards * rows, ...]: the inverse of `_split_into_chunks`."""
    shard_major = x.reshape(len(x), shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(shards, -1, *x.shape[2:])
    return shard_major[:, :rows].reshape(shards * rows, *x.shape[2:])
