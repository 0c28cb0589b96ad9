"""Attention kernels: all agree with `einsum`, also on a mesh, and those of accelerators compile for them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from helpers.commands import TPU_COMPILER_ENV, run_command
from helpers.loading import draw_texts, load_model, pack_texts
from helpers.training_batches import list_all_slots
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import get_target_platform, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.errors import UserError
from jaxembed.model import kernels, splash
from jaxembed.model.kernels import pick_kernel, resolve_kernel
from jaxembed.model.masks import MASKS, TokenInfo
from jaxembed.model.plain_attention import attend_einsum, attend_rows
from jaxembed.planning.topology import NO_TPU_ENVIRONMENT
from jaxembed.training.gradcache import encode

ROWS, HEADS, WIDTH = 4, 4, 8
AttentionInputs = tuple[jax.Array, jax.Array, jax.Array, TokenInfo]


def draw_inputs(tokens: int, kv_heads: int = 2, dtype: Any = jnp.float32, rows: int = ROWS) -> AttentionInputs:
    """Draw queries, keys and values of rows that hold several texts and, except for the first row, padding."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(rows, tokens, heads, WIDTH)) for heads in (HEADS, kv_heads, kv_heads))
    segment, position = np.zeros((2, rows, tokens), np.int32)
    for row in range(rows):
        cuts = np.sort(random.choice(np.arange(1, tokens), 4, replace=False))
        for text, (start, end) in enumerate(zip([0, *cuts], [*cuts, tokens], strict=True)):
            if row == 0 or text < 4:
                segment[row, start:end], position[row, start:end] = text + 1, np.arange(end - start)
    in_text = jax.device_put(position > 1)
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), TokenInfo(jnp.asarray(segment), jnp.asarray(position), in_text)


def make_output_and_gradients(
    kernel: Callable[..., jax.Array], inputs: AttentionInputs, mask: str, window: Any
) -> Callable[..., Any]:
    """Return a function (q, k, v, token_info) -> (output at texts, gradients of a weighted sum of it by q, k and v)."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), inputs[0].dtype)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, token_info: TokenInfo) -> Any:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out = jnp.where(token_info.segment[..., None, None] > 0, kernel(q, k, v, token_info, MASKS[mask], window), 0)
            return jnp.sum(out * weights), out

        grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return run


def assert_close(ours: Sequence[jax.Array], reference: Sequence[jax.Array], tolerance: float = 1e-5) -> None:
    """Check that each array is close to its reference, which must not be all small."""
    for a, b in zip(ours, reference, strict=True):
        assert np.abs(b).max() > 0.1
        assert np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() < tolerance


@pytest.mark.parametrize(
    ("mask", "window", "tokens"),
    [("causal", None, 40), ("bidirectional", None, 128), ("causal", 3, 600), ("bidirectional", 3, 40)],
)
def test_splash_agrees_with_einsum(mask: str, window: int | None, tokens: int) -> None:
    """The rows are padded to one block, equal to one block, or padded to several blocks."""
    inputs = draw_inputs(tokens)
    actual, expected = (
        jax.jit(make_output_and_gradients(kernel, inputs, mask, window))(*inputs)
        for kernel in (pick_kernel("splash", 1), attend_einsum)
    )
    assert_close(actual, expected)
    seen = np.asarray(inputs[3].segment) > 0
    assert np.abs(attend_einsum(*inputs, MASKS[mask], 4) - expected[0])[seen].max() > 0.1


def test_splash_has_a_kernel_for_each_of_several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window of a layer is then an array, by which the compiled program chooses. 40 stands for no window."""
    inputs, kernel = draw_inputs(40), pick_kernel("splash", 1, (3, 40))
    run = jax.jit(lambda q, k, v, info, w: make_output_and_gradients(kernel, inputs, "causal", w)(q, k, v, info))
    for array, window in ((3, 3), (40, None)):
        expected = jax.jit(make_output_and_gradients(attend_einsum, inputs, "causal", window))(*inputs)
        assert_close(run(*inputs, jnp.array(array)), expected)
    set_platform(monkeypatch, "tpu")
    half = draw_inputs(40, dtype=jnp.bfloat16)
    attend = pick_kernel("auto", 1, (3, 40))
    traced = jax.jit(lambda *x: attend(*x[:-1], MASKS["causal"], x[-1])).trace(*half, jnp.array(3))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize(("rows", "kv_heads"), [(4, 2), (3, 1)])
def test_splash_is_sharded_over_rows_and_heads(rows: int, kv_heads: int) -> None:
    """Devices communicate only if the mesh does not divide rows and heads. The output is the same."""
    inputs = draw_inputs(40, kv_heads, rows=rows)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    split = PartitionSpec("data", None, "tensor") if rows == 4 else PartitionSpec()
    sharded_qkv = jax.device_put(inputs[:3], NamedSharding(mesh, split))
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(make_output_and_gradients(pick_kernel("splash", 4), inputs, "causal", None))
            .lower(*sharded_qkv, inputs[3])
            .compile()
        )
        actual = compiled(*sharded_qkv, inputs[3])
    assert_close(actual, jax.jit(make_output_and_gradients(attend_einsum, inputs, "causal", None))(*inputs))
    collectives = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text())
    assert (not collectives) == (rows == 4)


def test_splash_inside_a_shard_map_over_some_axes() -> None:
    inputs = draw_inputs(40)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("data")

    def run(*inputs: Any) -> jax.Array:
        return pick_kernel("splash", 1)(*inputs, MASKS["causal"], None)

    with jax.set_mesh(mesh):
        sharded_run = jax.shard_map(run, in_specs=(rows,) * 4, out_specs=rows, axis_names={"data"}, check_vma=False)
        actual = jax.jit(sharded_run)(*inputs)
    seen = np.asarray(inputs[3].segment) > 0
    assert np.abs(actual - attend_einsum(*inputs, MASKS["causal"], None))[seen].max() < 1e-5


def test_a_model_with_splash_has_the_gradients_of_einsum(
    base_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Encode in chunks of rows on two devices, with a sliding window and rematerialized layers."""
    packed, _ = pack_texts(draw_texts((3, 17, 30, 9, 1, 12, 25, 20)), 32, shards=2)
    weights = np.random.default_rng(0).normal(size=(len(packed.tokens), packed.segments, 32))
    mesh, grads = make_mesh(2), {}
    for kernel, rows in (("einsum", None), ("splash", 1)):
        options: dict[str, Any] = {"remat": True, "unroll": False, "attention_kernel": kernel}
        model, params = load_model(base_folder("mistral-window"), EmbeddingSpec(attention="causal"), 2, **options)
        key = jax.random.key(0)

        def total(params: Any, texts: Any, model: Any = model, rows: Any = rows, key: Any = key) -> jax.Array:
            vectors = encode(model, params, texts, list_all_slots(texts), key, rows)
            return jnp.sum(vectors * weights.reshape(vectors.shape))

        with jax.set_mesh(mesh):
            grads[kernel] = jax.tree.leaves(jax.jit(jax.grad(total))(params, put_batch(mesh, packed)))
    assert not caplog.records
    for a, b in zip(grads["splash"], grads["einsum"], strict=True):
        assert np.linalg.norm(b) > 0 and np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("mask", "window", "dtype", "limit"),
    [
        ("prefix", None, jnp.float32, "a mask that treats instructions differently"),
        ("causal", 3, jnp.float64, "float64 values"),
    ],
)
def test_einsum_replaces_splash_with_one_warning(
    mask: str, window: Any, dtype: Any, limit: str, caplog: pytest.LogCaptureFixture
) -> None:
    with jax.enable_x64(dtype == jnp.float64), caplog.at_level(logging.INFO, "jaxembed"):
        inputs = draw_inputs(8, dtype=dtype)
        for _ in range(2):
            actual = pick_kernel("splash", 1)(*inputs, MASKS[mask], window)
        assert np.array_equal(actual, attend_einsum(*inputs, MASKS[mask], window))
    warning = f"attention kernel splash does not support {limit}; einsum is used instead"
    assert [record.message for record in caplog.records] == [warning]


def set_platform(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    for module in (kernels, splash):
        monkeypatch.setattr(module, "get_target_platform", lambda: platform)


def test_each_platform_has_a_default_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_target_platform() == "cpu"
    assert pick_kernel("auto", 2).func is attend_rows
    message = (
        r"^model.attention_kernel: cudnn does not run on this platform \(found cpu; expected gpu\). "
        "Set it to auto, einsum or rows.$"
    )
    with pytest.raises(UserError, match=message):
        pick_kernel("cudnn", 1)
    set_platform(monkeypatch, "gpu")
    assert resolve_kernel("auto") == "cudnn"
    with pytest.raises(UserError, match=r"splash does not run on this platform \(found gpu; expected tpu or cpu\)"):
        pick_kernel("splash", 1)


def lower_text(kernel: Callable[..., jax.Array], inputs: AttentionInputs, platform: str) -> str:
    """Lower the forward and the backward pass for the compiler of another platform."""
    return str(
        jax.jit(make_output_and_gradients(kernel, inputs, "bidirectional", 5))
        .trace(*inputs)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )


def test_splash_lowers_for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    set_platform(monkeypatch, "tpu")
    text = lower_text(pick_kernel("auto", 1), draw_inputs(40, dtype=jnp.bfloat16), "tpu")
    assert set(re.findall(r"splash_mha_(\w+?)_segmented", text)) == {"fwd", "dq", "dkv"}
    assert text.count("tpu_custom_call") == 3


def test_attention_and_a_training_step_compile_for_tpus() -> None:
    """The compiler needs no chip, but its own process: libtpu is configured when it is first loaded."""
    pytest.importorskip("libtpu")
    result = run_command("helpers.tpu_programs", env=TPU_COMPILER_ENV | NO_TPU_ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "does not support" not in result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["attention"]["kernels"] == report["step"]["kernels"] == ["dkv", "dq", "fwd"]
    assert not report["attention"]["collectives"]
    assert "all-reduce" in report["step"]["collectives"]
