"""A batch encoded some rows at a time has the loss and the gradients of one encoded at once, in less memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.loading import load
from helpers.text_batches import ALL_DIRECTIONS, draw_unit_vectors
from helpers.training_batches import SPEC, assert_trees_close, build_host_batches, list_all_slots
from jaxembed.config import (
    DistillationConfig,
    EmbeddingMatchingConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    MatryoshkaConfig,
    SpreadOutConfig,
)
from jaxembed.data.batch import Batch, FrozenVectors
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.layers import unit_length
from jaxembed.model.lora import LoRA, join, split
from jaxembed.training.gradcache import encode
from jaxembed.training.step import OBJECTIVES, batch_loss

Folder = Callable[[str], Path]
KEY, CHUNK = jax.random.key(3), 6
FOUR_DIRECTIONS = Objectives(
    [InfoNCEConfig(temperature=0.2, directions=ALL_DIRECTIONS, margin=0.1), SpreadOutConfig()], MatryoshkaConfig(dims=(8,))
)
ALL_OTHERS = Objectives(
    [
        InfoNCEConfig(
            temperature=0.2, learn_temperature=True, guide="a model", guide_margin=-0.5, focal=0.5, hardness=2.0,
            hardness_of="all", mixed_negatives=2,
        ),
        DistillationConfig(hard_labels=0.2), MarginMSEConfig(), EmbeddingMatchingConfig(teacher="a model"),
    ],
)  # fmt: skip


def with_teacher(batch: Batch, width: int) -> Batch:
    """The batch with random vectors and scores of another model."""
    random = np.random.default_rng(0)
    shapes = batch.query_slot.shape, batch.doc_slot.shape
    other = FrozenVectors(*(draw_unit_vectors(random, *shape, width).astype(np.float32) for shape in shapes))
    scores = random.normal(size=batch.doc_slot.shape).astype(np.float32)
    return batch.replace(teacher_scores=scores, guide=other, teacher=other)


def compiled(model: EmbeddingModel, objectives: Objectives, params: Any, batch: Any, rows: int | None) -> jax.stages.Compiled:
    grad = jax.jit(jax.value_and_grad(lambda p, b: batch_loss(model, objectives, p, b, KEY, rows)[0]))
    return grad.lower(params, batch).compile()


@pytest.mark.parametrize(("devices", "objectives"), [(1, ALL_OTHERS), (8, FOUR_DIRECTIONS)])
def test_gradients_are_those_of_the_whole_batch(
    base_folder: Folder, source: Source, devices: int, objectives: Objectives
) -> None:
    """Also where the rows of a device are no multiple of the chunk's."""
    model, params = load(base_folder("qwen2"), SPEC, devices)
    params |= {OBJECTIVES: objectives.new_params(model.width, 5, KEY)}
    assert params[OBJECTIVES].keys() == ({"infonce", "embedding_matching"} if objectives is ALL_OTHERS else set())
    mesh = make_mesh(devices)
    host = with_teacher(build_host_batches(source, devices, 1, row_length=32)[0].batch, 5)
    rows = len(host.texts.tokens) // devices
    chunk = 4 if devices == 1 else 2
    assert rows % chunk and rows > chunk
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, host)
        whole, cached = (compiled(model, objectives, params, batch, at_once) for at_once in (None, chunk))
        (loss, grads), (cached_loss, cached_grads) = whole(params, batch), cached(params, batch)
    assert float(cached_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_trees_close(grads, cached_grads)
    if devices > 1:  # every device sums the gradients of its own chunks; they cross devices after the loop, once
        assert "all-reduce" in cached.as_text()
        assert not [body for body in bodies(cached.as_text()) if "all-reduce" in body]


def bodies(text: str) -> list[str]:
    """The computations of loops in a compiled program."""
    parts = dict(re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    names = re.findall(r"body=%?([\w.-]+)", text)
    assert names
    return [parts[name] for name in names]


def test_a_chunk_is_encoded_with_the_same_dropout_twice(base_folder: Folder, source: Source) -> None:
    lora = LoRA(4, 8.0, dropout=0.3, deterministic=False)
    model, params = load(base_folder("qwen2"), SPEC, 1, lora=lora)
    trained, frozen = split(params)
    texts = build_host_batches(source, 1, 1, row_length=32)[0].batch.texts
    count = len(texts.tokens) // CHUNK
    texts = jax.tree.map(lambda x: jnp.asarray(x[: count * CHUNK]), texts)  # whole chunks
    keys = jax.random.split(KEY, (1, count))[0]
    weights = jnp.array(np.random.default_rng(0).normal(size=(len(texts.tokens), texts.segments, 32)))

    names = ("tokens", "segment_ids", "positions", "pool_mask")
    parts = [{name: getattr(texts, name)[CHUNK * i : CHUNK * (i + 1)] for name in names} for i in range(count)]

    @jax.jit
    @jax.value_and_grad
    def of_chunk(trained: Any, part: dict[str, jax.Array], key: jax.Array, weights: jax.Array) -> jax.Array:
        packed = PackedTexts(**part, segments=texts.segments, shards=1)
        vectors = unit_length(model.apply({"params": join(trained, frozen)}, packed, rngs={"dropout": key}))
        return jnp.sum(vectors * weights)

    def cached(trained: Any) -> jax.Array:
        vectors = encode(model, join(trained, frozen), texts, list_all_slots(texts), KEY, CHUNK)
        return jnp.sum(vectors * weights.reshape(vectors.shape))

    assert count > 1 and len(texts.tokens) % CHUNK == 0
    chunks = zip(parts, keys, weights.reshape(count, CHUNK, *weights.shape[1:]), strict=True)
    a, grads = jax.tree.map(lambda *of_chunks: sum(of_chunks), *(of_chunk(trained, *chunk) for chunk in chunks))
    b, cached_grads = jax.jit(jax.value_and_grad(cached))(trained)
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(cached_grads), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x)


def test_memory_is_that_of_a_chunk(base_folder: Folder) -> None:
    model, params = load(base_folder("qwen2"), SPEC, 1)

    def temporary(count: int, rows: int | None) -> int:
        zeros = {n: jax.ShapeDtypeStruct((count, 256), jnp.int32) for n in ("tokens", "segment_ids", "positions")}
        texts = PackedTexts(**zeros, pool_mask=jax.ShapeDtypeStruct((count, 256), bool), segments=4, shards=1)
        slots = 4 * jnp.arange(count)[:, None]
        grad = jax.jit(jax.grad(lambda p, t: encode(model, p, t, slots, KEY, rows).sum()))
        return int(grad.lower(params, texts).compile().memory_analysis().temp_size_in_bytes)

    assert temporary(128, 8) < 1.3 * temporary(32, 8) < 0.5 * temporary(128, None)
