"""Meshes and shardings, on eight simulated devices."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import LOGICAL_AXES, _arrange_devices, make_mesh, param_shardings, shard_count
from jaxembed.devices.placement import put_batch, replicated_jit, replicated_sharding, unstack_views
from jaxembed.model.embedder import EmbeddingModel, init_params, parameter_shapes
from jaxembed.model.families import from_hf, preset
from jaxembed.model.lora import LoRA


def test_a_mesh_takes_all_devices_or_as_many_as_asked_for() -> None:
    assert [shard_count(make_mesh(count)) for count in (-1, 1, 3, 8)] == [8, 1, 3, 8]
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


KEPT = """
import jax, resource
from jaxembed import cli
from jaxembed.devices.cpu import release_freed_memory, retain_freed_memory
from jaxembed.devices.mesh import LOGICAL_AXES, _arrange_devices, make_mesh, param_shardings, shard_count
from jaxembed.devices.placement import put_batch, replicated_jit, replicated_sharding, unstack_views

cli.set_up_jax()
retain_freed_memory()
held = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
run, numbers = jax.jit(lambda x: jax.numpy.sort(x)[::1000]), jax.numpy.arange(1 << 24)
before = held()
run(numbers).block_until_ready()
kept = held() - before
release_freed_memory()
print(kept, held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_a_programs_memory_is_kept_for_the_next() -> None:
    told = subprocess.run([sys.executable, "-c", KEPT], env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, check=True)
    kept, left = map(int, told.stdout.split())
    assert kept >= 4 << 24 > 3 * left


def test_views_are_the_memory_of_their_array_and_nobody_overwrites_them() -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    x = replicated_jit(mesh, lambda: jax.numpy.arange(3 * 32.0).reshape(3, 32))
    wanted, entries = np.array(x), unstack_views(mesh, x)
    begins = [entry.unsafe_buffer_pointer() for entry in entries]
    assert begins == [x.unsafe_buffer_pointer() + row * 128 for row in range(3)]
    given_away = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert given_away.unsafe_buffer_pointer() not in begins
    np.testing.assert_array_equal(entries, wanted)


def test_an_axis_may_lie_along_parts_of_the_machines() -> None:
    """Eight of a square of 4 x 4 chips: two rows of it, neighbours beside each other."""
    places = [(i % 4, i // 4, 0) for i in range(16)]
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0, "process_index": 0}
    chips = [SimpleNamespace(id=i, coords=place, **kind) for i, place in enumerate(places)]
    groups = _arrange_devices((2, 8, 1), chips).reshape(2, 8)
    rows = [{chip.coords[1] for chip in group} for group in groups]
    assert rows == [{0, 1}, {2, 3}]
    assert _arrange_devices((1, 16, 1), chips).shape == (1, 16, 1)


def test_a_batch_is_split_in_order_over_its_first_axis() -> None:
    mesh = make_mesh(4)
    placed = put_batch(mesh, {"a": np.arange(8).reshape(8, 1), "b": np.arange(4)})
    for name, per_device in (("a", 2), ("b", 1)):
        pieces = [np.asarray(shard.data).ravel().tolist() for shard in placed[name].addressable_shards]
        assert pieces == np.arange(4 * per_device).reshape(4, per_device).tolist()


def test_every_parameter_declares_axes_that_the_table_knows() -> None:
    for name, lora in (("qwen2-0.5b", LoRA(8, 16.0, base_dtype="int8")), ("mistral-7b", LoRA(8, 16.0)), ("tiny", None)):
        boxed = parameter_shapes(EmbeddingModel(from_hf(preset(name), name), EmbeddingSpec(), lora=lora))
        specs = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))
        shapes = jax.tree.leaves(nn.unbox(boxed))
        assert all(len(spec) == len(shape.shape) for spec, shape in zip(specs, shapes, strict=True))
        assert {axis for spec in specs for axis in spec} <= {*LOGICAL_AXES, None}


def test_an_axis_that_the_table_lacks_is_an_error() -> None:
    mesh = make_mesh(2)
    assert param_shardings(mesh, {"a": PartitionSpec("embed", None)})["a"].spec == PartitionSpec("fsdp", None)
    with pytest.raises(KeyError, match="colour"):
        param_shardings(mesh, {"a": PartitionSpec("colour")})
    with pytest.raises(Exception, match="at most one positional dimension"):
        param_shardings(mesh, {"a": PartitionSpec("heads", "mlp")})  # both on one mesh axis


def test_random_parameters_do_not_depend_on_the_devices() -> None:
    model = EmbeddingModel(from_hf({**preset("tiny"), "vocab_size": 50}, "test"), EmbeddingSpec())
    specs = nn.get_partition_spec(parameter_shapes(model))
    one, eight = (
        init_params(model, jax.random.key(0), param_shardings(make_mesh(*shape), specs)) for shape in ((1, 1, 1), (2, 2, 2))
    )
    kernel, scale = one["decoder"]["layers"]["mlp"]["up"]["kernel"], one["decoder"]["norm"]["scale"]
    assert abs(float(kernel.std()) - 0.02) < 1e-3 and (scale == 1).all()
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True))
    everywhere = replicated_sharding(make_mesh(8))
    several = init_params(model, jax.random.split(jax.random.key(1)), {"decoder": {"embedding": everywhere}})
    for key, drawn in zip(jax.random.split(jax.random.key(1)), several["decoder"]["embedding"], strict=True):
        alone = init_params(model, key, {"decoder": {"embedding": everywhere}})
        assert np.array_equal(drawn, alone["decoder"]["embedding"])
