"""The kernels of attention: all compute what `einsum` does, on a mesh too, and those of accelerators compile for them."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from helpers.loading import draw_texts, in_rows, load
from helpers.training_batches import list_all_slots
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh, target_platform
from jaxembed.devices.placement import put_batch
from jaxembed.errors import UserError
from jaxembed.model import kernels
from jaxembed.model.kernels import attend, pick_kernel
from jaxembed.model.masks import MASKS, TokenInfo
from jaxembed.training.gradcache import encode

ROWS, HEADS, WIDTH = 4, 4, 8
Inputs = tuple[jax.Array, jax.Array, jax.Array, TokenInfo]


def inputs(tokens: int, kv_heads: int = 2, dtype: Any = jnp.float32, rows: int = ROWS) -> Inputs:
    """Queries, keys and values at random, of rows that hold several texts and, but for the first, padding."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(rows, tokens, heads, WIDTH)) for heads in (HEADS, kv_heads, kv_heads))
    segment, position = np.zeros((2, rows, tokens), np.int32)
    for row in range(rows):
        borders = np.sort(random.choice(np.arange(1, tokens), 4, replace=False))
        for text, (start, end) in enumerate(zip([0, *borders], [*borders, tokens], strict=True)):
            if row == 0 or text < 4:
                segment[row, start:end], position[row, start:end] = text + 1, np.arange(end - start)
    in_text = jnp.asarray(position > 1)
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), TokenInfo(jnp.asarray(segment), jnp.asarray(position), in_text)


def outcome(kernel: Callable[..., jax.Array], given: Inputs, mask: str, window: Any) -> Callable[..., Any]:
    """A function of (q, k, v, places): the outcome at texts, and the gradients of q, k and v of a weighted sum of it."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=given[0].shape), given[0].dtype)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, places: TokenInfo) -> Any:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out = jnp.where(places.segment[..., None, None] > 0, kernel(q, k, v, places, MASKS[mask], window), 0)
            return jnp.sum(out * weights), out

        grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return run


def close(got: Sequence[jax.Array], want: Sequence[jax.Array], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert np.abs(b).max() > 0.1
        assert np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() < tolerance


@pytest.mark.parametrize(
    ("mask", "window", "tokens"),
    [("causal", None, 40), ("bidirectional", None, 128), ("causal", 3, 600), ("bidirectional", 3, 40)],
)
def test_splash_is_einsum(mask: str, window: int | None, tokens: int) -> None:
    """In rows that are padded to one block, that are one, and that are padded to several."""
    given = inputs(tokens)
    got, want = (jax.jit(outcome(kernel, given, mask, window))(*given) for kernel in (pick_kernel("splash", 1), attend))
    close(got, want)
    seen = np.asarray(given[3].segment) > 0
    assert np.abs(attend(*given, MASKS[mask], 4) - want[0])[seen].max() > 0.1


@pytest.mark.parametrize(("rows", "kv_heads"), [(4, 2), (3, 1)])
def test_splash_on_a_mesh_takes_own_rows_and_heads(rows: int, kv_heads: int) -> None:
    """Nothing is sent where the mesh divides rows and heads; where it does not, the outcome is the same."""
    given = inputs(40, kv_heads, rows=rows)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    split = PartitionSpec("data", None, "tensor") if rows == 4 else PartitionSpec()
    placed = jax.device_put(given[:3], NamedSharding(mesh, split))
    with jax.set_mesh(mesh):
        compiled = jax.jit(outcome(pick_kernel("splash", 4), given, "causal", None)).lower(*placed, given[3]).compile()
        got = compiled(*placed, given[3])
    close(got, jax.jit(outcome(attend, given, "causal", None))(*given))
    sent = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text())
    assert (not sent) == (rows == 4)


def test_splash_where_a_mesh_is_split_by_hand_in_part() -> None:
    given = inputs(40)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("data")

    def run(*given: Any) -> jax.Array:
        return pick_kernel("splash", 1)(*given, MASKS["causal"], None)

    with jax.set_mesh(mesh):
        by_hand = jax.shard_map(run, in_specs=(rows,) * 4, out_specs=rows, axis_names={"data"}, check_vma=False)
        got = jax.jit(by_hand)(*given)
    seen = np.asarray(given[3].segment) > 0
    assert np.abs(got - attend(*given, MASKS["causal"], None))[seen].max() < 1e-5


def test_a_model_with_splash_has_the_gradients_of_one_without(
    base_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """In chunks of rows on two devices, in layers that have a window and are computed again in the backward pass."""
    kernels._warn_once.cache_clear()
    packed, _ = in_rows(draw_texts((3, 17, 30, 9, 1, 12, 25, 20)), 32, shards=2)
    weights = np.random.default_rng(0).normal(size=(len(packed.tokens), packed.segments, 32))
    mesh, grads = make_mesh(2), {}
    for kernel, rows in (("einsum", None), ("splash", 1)):
        how: dict[str, Any] = {"remat": True, "unroll": False, "attention_kernel": kernel}
        model, params = load(base_folder("mistral-window"), EmbeddingSpec("causal"), 2, **how)
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
    ("mask", "window", "dtype", "told"),
    [
        ("prefix", None, jnp.float32, "a mask that treats instructions differently"),
        ("causal", jnp.array(3), jnp.float32, "windows that differ from layer to layer"),
        ("causal", 3, jnp.float64, "float64 numbers"),
    ],
)
def test_einsum_does_what_splash_cannot_and_the_log_says_so_once(
    mask: str, window: Any, dtype: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels._warn_once.cache_clear()
    with jax.enable_x64(dtype == jnp.float64), caplog.at_level(logging.INFO, "jaxembed"):
        given = inputs(8, dtype=dtype)
        for _ in range(2):
            got = pick_kernel("splash", 1)(*given, MASKS[mask], window)
        assert np.array_equal(got, attend(*given, MASKS[mask], window))
    assert [record.message for record in caplog.records] == [f"attention kernel splash does not compute {told}: einsum does"]


def on(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(kernels, "target_platform", lambda: platform)


def test_each_platform_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert target_platform() == "cpu"
    assert pick_kernel("auto", 2).func is kernels.attend_by_rows
    told = "^model.attention_kernel is cudnn, which runs on gpu, and this is cpu; choose auto, einsum or rows$"
    with pytest.raises(UserError, match=told):
        pick_kernel("cudnn", 1)
    on(monkeypatch, "gpu")
    assert pick_kernel("auto", 2) is attend
    with pytest.raises(UserError, match=r"splash, which runs on tpu and cpu, and this is gpu"):
        pick_kernel("splash", 1)


def program(kernel: Callable[..., jax.Array], given: Inputs, platform: str) -> str:
    """Forward and backward pass as they are handed to the compiler of a platform that is not here."""
    return str(
        jax.jit(outcome(kernel, given, "bidirectional", 5)).trace(*given).lower(lowering_platforms=(platform,)).as_text()
    )


def test_splash_is_the_kernel_of_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "tpu")
    text = program(pick_kernel("auto", 1), inputs(40, dtype=jnp.bfloat16), "tpu")
    assert set(re.findall(r"splash_mha_(\w+?)_segmented", text)) == {"fwd", "dq", "dkv"}
    assert text.count("tpu_custom_call") == 3


def test_cudnn_is_called_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX asks the library for its version, and there is none here."""
    on(monkeypatch, "gpu")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    text = program(pick_kernel("cudnn", 1), inputs(40, dtype=jnp.bfloat16), "cuda")
    assert set(re.findall(r"__cudnn\$\w+", text)) == {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}
    for given in (inputs(40), inputs(41, dtype=jnp.bfloat16)):
        assert "__cudnn" not in program(pick_kernel("cudnn", 1), given, "cuda")


def test_what_cudnn_is_asked_for_is_einsum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of cuDNN, answered by XLA: mask, scale and groups of heads are right."""
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, mask, implementation: asked(*x, mask=mask))
    given = inputs(40)
    got, want = (jax.jit(outcome(kernel, given, "prefix", 5))(*given) for kernel in (kernels.attend_by_cudnn, attend))
    close(got, want)


def test_the_compiler_of_tpus_takes_attention_and_a_training_step() -> None:
    """Without a chip, in a process of its own: whoever loads the library first decides for what."""
    pytest.importorskip("libtpu")
    ours = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    others = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    here = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, str(here / "helpers" / "tpu_programs.py")], env={**others, **ours, "PYTHONPATH": str(here.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "does not compute" not in ran.stderr
    made = json.loads(ran.stdout.splitlines()[-1])
    assert made["attention"]["kernels"] == made["step"]["kernels"] == ["dkv", "dq", "fwd"]
    assert not made["attention"]["collectives"]
    assert "all-reduce" in made["step"]["collectives"]
