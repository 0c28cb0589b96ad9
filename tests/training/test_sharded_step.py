"""A step sharded over data, fsdp and tensor has the loss and the gradients of one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers.training_batches import SPEC, assert_trees_close, build_host_batches
from jaxembed.config import ExitsConfig, InfoNCEConfig, LoraConfig, MatryoshkaConfig
from jaxembed.data.batch import Batch
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import count_shards, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.losses import blockwise
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel, init_params
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.model.transformer import ComputeOptions
from jaxembed.training.step import compute_batch_loss

Folder = Callable[[str], Path]
KEY = jax.random.key(1)
DIRECTIONS = ("query_document", "query_query")
INFONCE = InfoNCEConfig(temperature=0.2, directions=DIRECTIONS, margin=0.1)
# With and without adapters. A loop over candidates is compiled for each direction, width and exit.
OBJECTIVES = {
    True: Objectives([INFONCE], exits=ExitsConfig(layers=(1,), random=1, align=0.5)),
    False: Objectives([INFONCE], MatryoshkaConfig(dims=(8,))),
}
MESHES = {"data": (8, 1, 1), "all three": (2, 2, 2), "fsdp": (1, 8, 1), "more than key-value heads": (1, 2, 4)}


def build_model(base: Path, lora: bool) -> EmbeddingModel:
    config = parse_hf_config(json.loads((base / "config.json").read_text()), str(base))
    return EmbeddingModel(config, SPEC, ComputeOptions(unroll=False), LoraConfig(rank=4, alpha=8.0) if lora else None)


def draw_params(model: EmbeddingModel, shape: tuple[int, int, int]) -> Any:
    """Draw the parameters on a mesh."""
    return init_params(model, KEY, compute_shapes_and_shardings(model, make_mesh(*shape))[1])


def value_and_grad(
    model: EmbeddingModel, params: Any, source: Source, shape: tuple[int, int, int], rows: int | None
) -> tuple[float, Any]:
    """Return the loss and the gradients of all parameters, also the frozen ones, on a mesh."""
    mesh = make_mesh(*shape)
    params = jax.device_put(params, compute_shapes_and_shardings(model, mesh)[1])
    host = build_host_batches(source, count_shards(mesh), 1, row_length=32)[0].batch

    @jax.jit
    @jax.value_and_grad
    def run(params: Any, batch: Batch) -> jax.Array:
        # Adapters and poolings start at zero, which would hide half of the gradients.
        params = jax.tree.map(lambda x: jnp.where(x.any(), x, x + 0.02), params)
        return compute_batch_loss(model, OBJECTIVES[model.lora is not None], params, batch, KEY, rows)[0]

    with jax.set_mesh(mesh):
        loss, grads = run(params, put_batch(mesh, host))
    return float(loss), grads


@pytest.mark.parametrize(("lora", "meshes"), [(False, ["all three"]), (True, list(MESHES))])
def test_gradients_equal_those_of_one_device(
    base_folder: Folder, source: Source, lora: bool, meshes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard negatives, gradient caching, two directions and sums over blocks; with adapters and exits, or with Matryoshka."""
    monkeypatch.setattr(blockwise, "MAX_SCORES_PER_BLOCK", 64)
    model = build_model(base_folder("qwen2"), lora)
    params = draw_params(model, (1, 1, 1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), params, draw_params(model, MESHES["all three"]))
    expected_loss, expected_grads = value_and_grad(model, params, source, (1, 1, 1), None)
    assert 3.0 < expected_loss < 20.0
    for name in meshes:
        loss, grads = value_and_grad(model, params, source, MESHES[name], 1)
        assert loss == pytest.approx(expected_loss, rel=1e-5), name
        assert_trees_close(expected_grads, grads)


def test_every_device_holds_its_shard_of_the_parameters(base_folder: Folder) -> None:
    model = build_model(base_folder("qwen2"), False)
    params = flatten_dict(init_params(model, KEY, compute_shapes_and_shardings(model, make_mesh(2, 2, 2))[1]), sep="/")
    shard_counts = {path: x.size // x.addressable_shards[0].data.size for path, x in params.items()}
    layers = "decoder/layers"
    assert shard_counts["decoder/embedding"] == shard_counts[f"{layers}/attention/q/bias"] == 2
    assert (
        shard_counts[f"{layers}/attention/k/kernel"]
        == shard_counts[f"{layers}/mlp/up/kernel"]
        == shard_counts[f"{layers}/mlp/down/kernel"]
        == 4
    )
    assert shard_counts[f"{layers}/mlp_norm/scale"] == shard_counts["decoder/norm/scale"] == 1


def test_key_value_heads_that_tensor_does_not_divide_are_replicated(base_folder: Folder) -> None:
    """The model has two key-value heads and four query heads, on four devices."""
    model = build_model(base_folder("qwen2"), False)
    shardings = flatten_dict(compute_shapes_and_shardings(model, make_mesh(1, 2, 4))[1], sep="/")
    kernels = (shardings[f"decoder/layers/attention/{name}/kernel"].spec for name in ("q", "k"))
    assert [tuple(spec) for spec in kernels] == [(None, "fsdp", "tensor"), (None, "fsdp", None)]


def test_a_run_can_load_another_model_under_its_mesh(base_folder: Folder) -> None:
    """A run sets its mesh before it opens the model that mines for a stage."""
    with jax.set_mesh(make_mesh(2)):
        shapes, shardings = compute_shapes_and_shardings(build_model(base_folder("qwen3"), False), make_mesh(1))
    assert {sharding.mesh.size for sharding in jax.tree.leaves(shardings)} == {1}
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
