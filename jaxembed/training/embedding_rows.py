"""Lazy updates of the token embedding: a step reads and writes only the rows whose tokens occur in its batch.

The step trains a small table of these rows instead of the embedding, with their moments. The gradient of the small table has
the same numbers as that of the embedding, whose other rows are zero. Then the rows are put back. Other rows keep their values
and moments, without decay. `torch.optim.SparseAdam` and TensorFlow Addons' LazyAdam do the same: the bias correction counts the
steps of all rows together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxembed.data.batch import Batch
from jaxembed.data.packing import PackedTexts
from jaxembed.devices.collectives import replicate
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.lora import EMBEDDING_PATH


def list_embedding_rows(model: EmbeddingModel, batch: Batch) -> Int[Array, " u"]:
    """Return the rows of the embedding that a batch reads, in order.

    The array has one entry per token of the batch, because compiled programs need static shapes. Unused entries are the
    vocabulary size, which is out of bounds. RoBERTa derives positions from the id of padding, so rows 0 to that id are always
    included, and keep their index.
    """
    c = model.transformer
    tokens = [jnp.arange(c.position_offset, dtype=jnp.int32), *(texts.tokens.reshape(-1) for texts in _list_texts(batch))]
    ids = replicate(jnp.concatenate(tokens))
    return jnp.unique(ids, size=min(ids.size, c.vocab_size), fill_value=c.vocab_size)


def select_rows(model: EmbeddingModel, batch: Batch, rows: Int[Array, " u"]) -> tuple[EmbeddingModel, Batch]:
    """Return the model whose embedding has only the given rows, and the batch with indices into them as tokens."""

    def change(texts: PackedTexts) -> PackedTexts:
        return dataclasses.replace(texts, tokens=jnp.searchsorted(rows, texts.tokens).astype(jnp.int32))

    token_batches = {
        label: dataclasses.replace(tokens, texts=change(tokens.texts)) for label, tokens in batch.token_batches.items()
    }
    texts = None if batch.texts is None else change(batch.texts)
    transformer = dataclasses.replace(model.transformer, vocab_size=len(rows))
    return model.clone(transformer=transformer), dataclasses.replace(batch, texts=texts, token_batches=token_batches)


def pick_rows(tree: Any, rows: Int[Array, " u"] | None) -> Any:
    """Return a tree of parameters or moments with only the given rows of the embedding. None means all: return `tree`."""
    if rows is None:
        return tree
    return _map_embedding(lambda x: x.at[rows].get(mode="clip"), tree)


def put_rows(tree: Any, rows: Int[Array, " u"] | None, row_tree: Any) -> Any:
    """Return `row_tree` with the embedding of `tree`, in which the given rows are replaced: the inverse of `pick_rows`."""
    if rows is None:
        return row_tree
    return _map_embedding(lambda new, x: x.at[rows].set(new, mode="drop"), row_tree, tree)


def _list_texts(batch: Batch) -> list[PackedTexts]:
    texts = [batch.texts, *(token_batch.texts for token_batch in batch.token_batches.values())]
    return [packed for packed in texts if packed is not None]


def _map_embedding(change: Callable[..., jax.Array], tree: Any, *others: Any) -> Any:
    """Map `change` over the embedding and its moments in trees of the same structure. Take other leaves from the first tree."""

    def change_leaf(path: Any, x: Any, *rest: Any) -> Any:
        # The paths of its moments end like that of the embedding.
        is_embedding = tuple(getattr(key, "key", None) for key in path[-2:]) == EMBEDDING_PATH
        return change(x, *rest) if is_embedding else x

    return jax.tree.map_with_path(change_leaf, tree, *others)
