"""A step split over data, fsdp and tensor has the loss and the gradients of one on one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from flax.traverse_util import flatten_dict
from test_gradcache import close
from test_step import SPEC, host_batches, source

from jaxembed.config import InfoNCEConfig, MatryoshkaConfig
from jaxembed.data.sources import Source
from jaxembed.devices.mesh import LOGICAL_AXES, logical_axis_table, make_mesh, shard_count
from jaxembed.devices.placement import put_batch
from jaxembed.errors import UserError
from jaxembed.hub.restore import shapes_and_shardings
from jaxembed.losses import blockwise
from jaxembed.losses.objectives import Objectives
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel, init_params
from jaxembed.model.families import from_hf
from jaxembed.model.lora import LoRA, join, split
from jaxembed.training.step import batch_loss

__all__ = ["source"]
Folder = Callable[[str], Path]
KEY = jax.random.key(1)
DIRECTIONS = ("query_document", "query_query")
OBJECTIVES = Objectives([InfoNCEConfig(temperature=0.2, directions=DIRECTIONS, margin=0.1)], MatryoshkaConfig(dims=(8,)))
MESHES = {"data": (8, 1, 1), "all three": (2, 2, 2), "fsdp": (1, 8, 1), "more than key-value heads": (1, 2, 4)}


def model_of(base: Path, lora: bool) -> EmbeddingModel:
    config = from_hf(json.loads((base / "config.json").read_text()), str(base))
    return EmbeddingModel(config, SPEC, Compute(unroll=False), LoRA(4, 8.0) if lora else None)


def value_and_grad(model: EmbeddingModel, source: Source, shape: tuple[int, int, int], rows: int | None) -> tuple[float, Any]:
    """Loss and gradients of what is trained, from parameters drawn on the mesh."""
    mesh = make_mesh(*shape)
    params = init_params(model, KEY, shapes_and_shardings(model, mesh)[1])
    # Adapters and poolings that are zero until trained would hide half of the gradients.
    params = jax.tree.map(lambda x: x if x.any() else x + 0.02, params)
    host = host_batches(source, shard_count(mesh), 1, row_length=32)[0].batch
    trained, frozen = split(params)
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, host)
        run = jax.value_and_grad(lambda p, b: batch_loss(model, OBJECTIVES, join(p, frozen), b, KEY, rows)[0])
        loss, grads = jax.jit(run)(trained, batch)
    return float(loss), grads


@pytest.mark.parametrize(("lora", "meshes"), [(False, ["data", "all three", "fsdp"]), (True, list(MESHES))])
def test_gradients_are_those_of_one_device(
    base_folder: Folder, source: Source, lora: bool, meshes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hard negatives, gradient caching, Matryoshka, two directions and sums over blocks, with and without adapters."""
    monkeypatch.setattr(blockwise, "SCORES_AT_ONCE", 64)
    model = model_of(base_folder("qwen2"), lora)
    one, grads_of_one = value_and_grad(model, source, (1, 1, 1), None)
    assert 3.0 < one < 20.0
    for name in meshes:
        loss, grads = value_and_grad(model, source, MESHES[name], 1)
        assert loss == pytest.approx(one, rel=1e-5), name
        close(grads_of_one, grads)


def test_every_device_holds_its_part_of_the_parameters(base_folder: Folder) -> None:
    model = model_of(base_folder("qwen2"), False)
    params = flatten_dict(init_params(model, KEY, shapes_and_shardings(model, make_mesh(2, 2, 2))[1]), sep="/")
    parts = {path: x.size // x.addressable_shards[0].data.size for path, x in params.items()}
    layers = "decoder/layers"
    assert parts["decoder/embedding"] == parts[f"{layers}/attention/q/bias"] == 2
    assert parts[f"{layers}/attention/k/kernel"] == parts[f"{layers}/mlp/up/kernel"] == parts[f"{layers}/mlp/down/kernel"] == 4
    assert parts[f"{layers}/mlp_norm/scale"] == parts["decoder/norm/scale"] == 1


def test_key_value_heads_that_do_not_come_out_even_are_on_every_device(base_folder: Folder) -> None:
    """Two of them, and four heads, on four devices."""
    model = model_of(base_folder("qwen2"), False)
    shardings = flatten_dict(shapes_and_shardings(model, make_mesh(1, 2, 4))[1], sep="/")
    kernels = (shardings[f"decoder/layers/attention/{name}/kernel"].spec for name in ("q", "k"))
    assert [tuple(spec) for spec in kernels] == [(None, "fsdp", "tensor"), (None, "fsdp", None)]


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    sizes = {"embed": 896, "heads": 14, "kv_heads": 2, "mlp": 4864}
    for shape, told in (
        ((1, 1, 4), r"mesh: tensor is 4, which does not divide the model's heads \(14\); the largest that fits is 2"),
        ((1, 6, 1), r"mesh: fsdp is 6, which does not divide the model's embed \(896\); the largest that fits is 4"),
    ):
        with pytest.raises(UserError, match=f"^{told}$"):
            logical_axis_table(make_mesh(*shape), sizes)
    assert logical_axis_table(make_mesh(1, 4, 2), sizes) == LOGICAL_AXES
    for shape, told in (
        ((9, 1, 1), "mesh.data is 9, but 8 devices are here; use at most that, or -1 for all"),
        (
            (2, 4, 2),
            "mesh.data is 2, mesh.fsdp is 4, mesh.tensor is 2, but 8 devices are here; use at most that, or -1 for all",
        ),
        ((-1, 3, 1), "mesh.data is -1, mesh.fsdp is 3: 3 does not divide the 8 devices that are here; use a divisor of that"),
    ):
        with pytest.raises(UserError, match=f"^{told}$"):
            make_mesh(*shape)


def test_slices_lie_along_data() -> None:
    class Device:
        platform, device_kind, process_index = "gpu", "of a slice", 0

        def __init__(self, number: int):
            self.id, self.slice_index = number, number % 2

    mesh = make_mesh(-1, 2, 1, [Device(number) for number in range(8)])
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert [[device.slice_index for device in row.ravel()] for row in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(
        UserError, match=r"^mesh.data is 1, which the 2 slices of devices do not divide; use a multiple of that$"
    ):
        make_mesh(1, 8, 1, [Device(number) for number in range(8)])
