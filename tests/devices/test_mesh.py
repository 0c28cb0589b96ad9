"""Meshes and shardings, on eight simulated devices."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import (
    LOGICAL_AXES,
    _arrange_devices,
    count_shards,
    make_logical_axis_table,
    make_mesh,
    make_param_shardings,
)
from jaxembed.devices.placement import make_replicated_sharding, put_batch, replicated_jit, unstack_views
from jaxembed.errors import UserError
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes, init_params
from jaxembed.model.presets import find_preset


def test_a_mesh_has_all_devices_or_the_requested_number() -> None:
    assert [count_shards(make_mesh(count)) for count in (-1, 1, 3, 8)] == [8, 1, 3, 8]
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((9, 1, 1), r"mesh.data=9: more devices than available \(8\)\. Use at most that many, or -1 for one axis\."),
        ((-1, 9, 1), r"mesh.data=-1, mesh.fsdp=9: more devices than available \(8\)\. Use at most that many\.$"),
        ((2, 4, 2), r"mesh.data=2, mesh.fsdp=4, mesh.tensor=2: more devices than available \(8\)"),
        ((-1, 3, 1), r"mesh.data=-1, mesh.fsdp=3: 3 does not divide the number of available devices \(8\)"),
    ],
)
def test_a_mesh_that_the_devices_do_not_fit_is_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make_mesh(*sizes)


def test_a_mesh_that_does_not_divide_the_model_is_refused() -> None:
    sizes = {"embed": 896, "heads": 14, "kv_heads": 2, "mlp": 4864}
    assert make_logical_axis_table(make_mesh(1, 4, 2), sizes) == LOGICAL_AXES
    with pytest.raises(UserError, match=r"^mesh.tensor=4: does not divide the model's heads \(14\)\. Use at most 2\.$"):
        make_logical_axis_table(make_mesh(1, 1, 4), sizes)
    with pytest.raises(UserError, match=r"^mesh.fsdp=6: does not divide the model's embed \(896\)\. Use at most 2\.$"):
        make_logical_axis_table(make_mesh(1, 6, 1), sizes)  # 4 divides the width, but not the 6 devices


def test_slices_lie_along_the_data_axis() -> None:
    devices = [SimpleNamespace(id=i, slice_index=i % 2, platform="gpu", device_kind="any", process_index=0) for i in range(8)]
    grid = _arrange_devices((4, 2, 1), devices)
    assert [[device.slice_index for device in row.ravel()] for row in grid] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match=r"^mesh.data=1: not a multiple of the number of device slices \(2\)"):
        _arrange_devices((1, 8, 1), devices)


def test_unstacked_views_share_memory_that_is_never_overwritten() -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    x = replicated_jit(mesh, lambda: jax.numpy.arange(3 * 32.0).reshape(3, 32))
    expected, views = np.array(x), unstack_views(mesh, x)
    addresses = [view.unsafe_buffer_pointer() for view in views]
    assert addresses == [x.unsafe_buffer_pointer() + row * 128 for row in range(3)]
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert result.unsafe_buffer_pointer() not in addresses
    np.testing.assert_array_equal(views, expected)


def test_a_mesh_axis_may_lie_along_parts_of_physical_axes() -> None:
    """An axis of 8 on a square of 4 x 4 chips takes two rows, with neighbors next to each other."""
    coordinates = [(i % 4, i // 4, 0) for i in range(16)]
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0, "process_index": 0}
    chips = [SimpleNamespace(id=i, coords=coords, **kind) for i, coords in enumerate(coordinates)]
    groups = _arrange_devices((2, 8, 1), chips).reshape(2, 8)
    rows = [{chip.coords[1] for chip in group} for group in groups]
    assert rows == [{0, 1}, {2, 3}]
    assert _arrange_devices((1, 16, 1), chips).shape == (1, 16, 1)


def test_a_batch_is_split_over_its_first_axis_in_order() -> None:
    mesh = make_mesh(4)
    batch = put_batch(mesh, {"a": np.arange(8).reshape(8, 1), "b": np.arange(4)})
    for name, rows_per_device in (("a", 2), ("b", 1)):
        shards = [np.asarray(shard.data).ravel().tolist() for shard in batch[name].addressable_shards]
        assert shards == np.arange(4 * rows_per_device).reshape(4, rows_per_device).tolist()


def test_every_parameter_declares_axes_of_the_table() -> None:
    for name, lora in (
        ("qwen2-0.5b", LoraConfig(rank=8, alpha=16.0, base_dtype="int8")),
        ("mistral-7b", LoraConfig(rank=8, alpha=16.0)),
        ("tiny", None),
        ("gemma3-270m", LoraConfig(rank=8, alpha=16.0, base_dtype="int8")),
        ("modernbert-base", None),
        ("bge-m3", LoraConfig(rank=8, alpha=16.0)),
    ):
        boxed = infer_parameter_shapes(EmbeddingModel(parse_hf_config(find_preset(name), name), EmbeddingSpec(), lora=lora))
        specs = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))
        shapes = jax.tree.leaves(nn.unbox(boxed))
        assert all(len(spec) == len(shape.shape) for spec, shape in zip(specs, shapes, strict=True))
        assert {axis for spec in specs for axis in spec} <= {*LOGICAL_AXES, None}


def test_an_axis_missing_from_the_table_raises() -> None:
    mesh = make_mesh(2)
    assert make_param_shardings(mesh, {"a": PartitionSpec("embed", None)})["a"].spec == PartitionSpec("fsdp", None)
    with pytest.raises(KeyError, match="colour"):
        make_param_shardings(mesh, {"a": PartitionSpec("colour")})
    with pytest.raises(Exception, match="at most one positional dimension"):
        make_param_shardings(mesh, {"a": PartitionSpec("heads", "mlp")})  # both on one mesh axis


def test_initial_parameters_do_not_depend_on_the_mesh() -> None:
    model = EmbeddingModel(parse_hf_config({**find_preset("tiny"), "vocab_size": 50}, "test"), EmbeddingSpec())
    specs = nn.get_partition_spec(infer_parameter_shapes(model))
    one, eight = (
        init_params(model, jax.random.key(0), make_param_shardings(make_mesh(*shape), specs))
        for shape in ((1, 1, 1), (2, 2, 2))
    )
    kernel, scale = one["decoder"]["layers"]["mlp"]["up"]["kernel"], one["decoder"]["norm"]["scale"]
    assert abs(float(kernel.std()) - 0.02) < 1e-3 and (scale == 1).all()
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True))
    shardings = {"decoder": {"embedding": make_replicated_sharding(make_mesh(8))}}
    keys = jax.random.split(jax.random.key(1))
    stacked = init_params(model, keys, shardings)["decoder"]["embedding"]
    for key, embedding in zip(keys, stacked, strict=True):
        assert np.array_equal(embedding, init_params(model, key, shardings)["decoder"]["embedding"])
