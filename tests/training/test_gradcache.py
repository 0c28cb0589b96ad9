"""Gradient caching: encoding a batch in chunks changes neither loss nor gradients, and needs less memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.loading import load_model
from helpers.text_batches import ALL_DIRECTIONS, draw_unit_vectors
from helpers.training_batches import SPEC, assert_trees_close, build_host_batches, list_all_slots
from jaxembed.config import (
    DistillationConfig,
    DropoutConfig,
    EmbeddingMatchingConfig,
    ExitsConfig,
    InfoNCEConfig,
    LoraConfig,
    MarginMSEConfig,
    MatryoshkaConfig,
    SpreadOutConfig,
)
from jaxembed.data.batch import Batch, FrozenVectors
from jaxembed.data.packing import PackedTexts
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.layers import l2_normalize
from jaxembed.model.lora import join_params, split_params
from jaxembed.planning.flops import count_matmul_flops
from jaxembed.training.gradcache import encode
from jaxembed.training.step import OBJECTIVE_PARAMS, compute_batch_loss

Folder = Callable[[str], Path]
KEY, CHUNK_ROWS = jax.random.key(3), 6
# A loop over candidates is compiled for each direction, width and exit: each feature is in one of these.
FOUR_DIRECTIONS = Objectives(
    [InfoNCEConfig(temperature=0.2, directions=ALL_DIRECTIONS, margin=0.1), SpreadOutConfig()],
    exits=ExitsConfig(random=1, align=0.5),
)
OTHER_OBJECTIVES = Objectives(
    [
        InfoNCEConfig(
            temperature=0.2, learn_temperature=True, guide="a model", guide_margin=-0.5, focal=0.5, hardness=2.0,
            hardness_of="all", mixed_negatives=2,
        ),
        DistillationConfig(hard_labels=0.2), MarginMSEConfig(), EmbeddingMatchingConfig(teacher="a model"),
    ],
    MatryoshkaConfig(dims=(8,)),
)  # fmt: skip


def add_teacher(batch: Batch, width: int) -> Batch:
    """Return the batch with random scores of a teacher, and random vectors [..., width] of a guide and a teacher."""
    random = np.random.default_rng(0)
    shapes = batch.query_slot.shape, batch.doc_slot.shape
    vectors = FrozenVectors(*(draw_unit_vectors(random, *shape, width).astype(np.float32) for shape in shapes))
    scores = random.normal(size=batch.doc_slot.shape).astype(np.float32)
    return batch.replace(teacher_scores=scores, guide=vectors, teacher=vectors)


def compile_loss_and_grad(
    model: EmbeddingModel, objectives: Objectives, params: Any, batch: Any, chunk_rows: int | None
) -> jax.stages.Compiled:
    grad = jax.jit(jax.value_and_grad(lambda p, b: compute_batch_loss(model, objectives, p, b, KEY, chunk_rows)[0]))
    return grad.lower(params, batch).compile()


def test_remat_policies_and_kept_chunks_change_what_is_computed_twice(base_folder: Folder, source: Source) -> None:
    """The gradients are equal. The FLOPs are those of the passes, where a forward pass counts 1 and a backward pass 2."""
    host = build_host_batches(source, 1, 1, row_length=32)[0].batch
    objectives = Objectives([InfoNCEConfig(temperature=0.2)], exits=ExitsConfig(layers=(2,), random=1, align=0.5))
    grads, flops = {}, {}
    for policy, recompute in (
        ("nothing", True),
        ("nothing", False),
        ("attention", True),
        ("matmuls", True),
        ("offload", True),
    ):
        options: dict[str, Any] = {"remat": True, "unroll": False, "remat_policy": policy, "attention_kernel": "einsum"}
        model, params = load_model(base_folder("qwen2"), SPEC, 1, **options)

        def loss(params: Any, batch: Any, model: Any = model, recompute: bool = recompute) -> jax.Array:
            return compute_batch_loss(model, objectives, params, batch, KEY, 4, recompute=recompute)[0]

        traced = jax.jit(jax.grad(loss)).trace(params, jax.device_put(host))
        flops[policy, recompute] = count_matmul_flops(traced.jaxpr)
        grads[policy, recompute] = traced.lower().compile()(params, jax.device_put(host))
    for other in list(grads.values())[1:]:
        assert_trees_close(grads["nothing", True], other)
    passes = {key: 5 * value / flops["nothing", True] for key, value in flops.items()}
    assert passes["nothing", False] == pytest.approx(4, abs=0.1)
    assert 4 < passes["matmuls", True] < passes["attention", True] < 5


@pytest.mark.parametrize(("devices", "objectives"), [(1, OTHER_OBJECTIVES), (8, FOUR_DIRECTIONS)])
def test_gradients_equal_those_of_the_whole_batch(
    base_folder: Folder, source: Source, devices: int, objectives: Objectives
) -> None:
    """The number of rows per device is not a multiple of the rows per chunk."""
    model, params = load_model(base_folder("qwen2"), SPEC, devices, unroll=False)
    params |= {OBJECTIVE_PARAMS: objectives.init_params(model.width, 5, KEY)}
    assert params[OBJECTIVE_PARAMS].keys() == ({"infonce", "embedding_matching"} if objectives is OTHER_OBJECTIVES else set())
    mesh = make_mesh(devices)
    host = add_teacher(build_host_batches(source, devices, 1, row_length=32)[0].batch, 5)
    rows = len(host.texts.tokens) // devices
    chunk_rows = 4 if devices == 1 else 2
    assert rows % chunk_rows and rows > chunk_rows
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, host)
        whole = compile_loss_and_grad(model, objectives, params, batch, None)
        cached = compile_loss_and_grad(model, objectives, params, batch, chunk_rows)
        (loss, grads), (cached_loss, cached_grads) = whole(params, batch), cached(params, batch)
    assert float(cached_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_trees_close(grads, cached_grads)
    if devices > 1:  # every device sums the gradients of its own chunks, which cross devices once, after the loop
        assert "all-reduce" in cached.as_text()
        assert not [body for body in find_loop_bodies(cached.as_text()) if "all-reduce" in body]


def find_loop_bodies(text: str) -> list[str]:
    """Return the text of each loop body in the text of a compiled program."""
    computations = dict(re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    names = re.findall(r"body=%?([\w.-]+)", text)
    assert names
    return [computations[name] for name in names]


def test_dropout_is_the_same_when_a_chunk_is_recomputed(base_folder: Folder, source: Source) -> None:
    """Dropout of adapters, of hidden states, and of attention weights."""
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.3, targets=("q_proj", "down_proj"))
    dropout = DropoutConfig(hidden=0.1, attention=0.2)
    model, params = load_model(base_folder("qwen2"), SPEC, 1, lora=lora, unroll=False, dropout=dropout)
    trained, frozen = split_params(params)
    texts = build_host_batches(source, 1, 1, row_length=32)[0].batch.texts
    chunks = len(texts.tokens) // CHUNK_ROWS
    texts = jax.tree.map(lambda x: jax.device_put(x[: chunks * CHUNK_ROWS]), texts)  # complete chunks only
    keys = jax.random.split(KEY, (1, chunks))[0]
    weights = jax.device_put(np.random.default_rng(0).normal(size=(len(texts.tokens), texts.segments, 32)))
    assert chunks > 1

    # One chunk after the other, without caching.
    @jax.jit
    @jax.value_and_grad
    def chunk_loss(trained: Any, arrays: dict[str, jax.Array], key: jax.Array, weights: jax.Array) -> jax.Array:
        packed = PackedTexts(**arrays, segments=texts.segments, shards=1)
        vectors = l2_normalize(model.apply({"params": join_params(trained, frozen)}, packed, rngs={"dropout": key}))
        return jnp.sum(vectors * weights)

    names = ("tokens", "segment_ids", "positions", "pool_mask")
    rows = [slice(CHUNK_ROWS * i, CHUNK_ROWS * (i + 1)) for i in range(chunks)]
    results = [
        chunk_loss(trained, {name: getattr(texts, name)[part] for name in names}, key, weights[part])
        for part, key in zip(rows, keys, strict=True)
    ]
    loss, grads = jax.tree.map(lambda *values: sum(values), *results)

    # The same by gradient caching.
    def cached_loss(trained: Any) -> jax.Array:
        vectors = encode(model, join_params(trained, frozen), texts, list_all_slots(texts), KEY, CHUNK_ROWS)
        return jnp.sum(vectors * weights.reshape(vectors.shape))

    cached, cached_grads = jax.jit(jax.value_and_grad(cached_loss))(trained)
    assert float(loss) == pytest.approx(float(cached), rel=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(cached_grads), strict=True):
        assert np.linalg.norm(np.subtract(x, y)) <= 1e-5 * np.linalg.norm(x)


def test_memory_does_not_grow_with_the_number_of_chunks(base_folder: Folder) -> None:
    model, params = load_model(base_folder("qwen2"), SPEC, 1)

    def temporary_bytes(rows: int, chunk_rows: int | None) -> int:
        shapes = {name: jax.ShapeDtypeStruct((rows, 256), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
        texts = PackedTexts(**shapes, pool_mask=jax.ShapeDtypeStruct((rows, 256), bool), segments=4, shards=1)
        slots = 4 * jnp.arange(rows)[:, None]
        grad = jax.jit(jax.grad(lambda p, t: encode(model, p, t, slots, KEY, chunk_rows).sum()))
        return int(grad.lower(params, texts).compile().memory_analysis().temp_size_in_bytes)

    assert temporary_bytes(128, 8) < 1.3 * temporary_bytes(32, 8) < 0.5 * temporary_bytes(128, None)
