"""A frozen base stored in bfloat16 or int8 under adapters: its bytes, its error, and that merging changes no vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers.adapters import load_adapted
from helpers.loading import draw_texts, encode_packed, load_model, pack_texts
from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.formats.peft import write_adapters
from jaxembed.hub.resolve import find_base
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.model.lora import merge_adapters, split_params
from jaxembed.model.matmul import frozen_matmul
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.model.presets import find_preset
from jaxembed.model.quantization import dequantize, quantize
from jaxembed.model.transformer import ComputeOptions

Folder = Callable[[str], Path]


def test_int8_error_is_at_most_half_a_scale() -> None:
    kernel = np.array([[1.27, 0.0, -4.0], [-0.5, 0.0, 2.0]], np.float32)
    numbers, scale = quantize(kernel)
    assert numbers.tolist() == [[127, 0, -127], [-50, 0, 64]]  # 2 / (4 / 127) = 63.5, to even
    np.testing.assert_allclose(scale, [0.01, 0, 4 / 127], rtol=1e-6)
    drawn = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    numbers, scale = quantize(drawn)
    error = np.abs(np.asarray(dequantize(jnp.asarray(numbers), jnp.asarray(scale))) - drawn)
    assert (error <= 0.5001 * scale).all() and error.max() > 0.4 * scale.min()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_matmul_equals_the_matmul_of_the_dequantized_kernel(dtype: str) -> None:
    random = np.random.default_rng(0)
    numbers, scale = (jnp.asarray(x) for x in quantize(random.normal(size=(64, 32)).astype(np.float32)))
    x = jnp.asarray(random.normal(size=(5, 64)), dtype)
    out, expected = frozen_matmul(x, numbers, scale, 0), x.astype(jnp.float32) @ dequantize(numbers, scale)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-4)


@pytest.mark.parametrize(("family", "dtype"), [("qwen2", "bfloat16"), ("qwen2", "int8"), ("modernbert", "int8")])
def test_merging_keeps_the_vectors(base_folder: Folder, family: str, dtype: Any) -> None:
    lora = LoraConfig(rank=3, alpha=6.0, base_dtype=dtype)
    model, params = load_adapted(base_folder(family), lora)
    model, packed = model.clone(compute=ComputeOptions(unroll=False)), pack_texts(draw_texts((5, 20, 9)), 32)
    unmerged, merged = encode_packed(model, params, *packed), merge_adapters(params, lora)
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"float32"}
    plain = model.clone(lora=None)
    np.testing.assert_allclose(encode_packed(plain, merged, *packed), unmerged, atol=1e-5)
    exact = merge_adapters(load_adapted(base_folder(family), LoraConfig(rank=3, alpha=6.0))[1], lora)
    rounded = np.abs(encode_packed(plain, exact, *packed) - unmerged).max()
    assert 1e-4 < rounded < 0.05


def test_memory_of_the_frozen_parameters() -> None:
    def count_bytes(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def frozen_shapes(dtype: Any) -> Any:
        transformer = parse_hf_config(find_preset("qwen2-0.5b"), "test")
        lora = LoraConfig(rank=16, alpha=32.0, base_dtype=dtype)
        return split_params(nn.unbox(infer_parameter_shapes(EmbeddingModel(transformer, EmbeddingSpec(), lora=lora))))[1][
            "decoder"
        ]

    trees = [frozen_shapes(dtype) for dtype in ("float32", "bfloat16", "int8")]
    layers, embedding = ([count_bytes(tree[part]) for tree in trees] for part in ("layers", "embedding"))
    assert layers == pytest.approx([layers[0], layers[0] / 2, layers[0] / 4], rel=5e-3)
    assert embedding == [embedding[0], embedding[0] / 2, embedding[0] / 2]


def test_loaded_parameters_have_the_declared_shapes_dtypes_and_shardings(base_folder: Folder) -> None:
    model, params = load_model(
        base_folder("qwen3"), EmbeddingSpec(), devices=2, lora=LoraConfig(rank=4, alpha=8.0, base_dtype="int8")
    )
    shapes, shardings = compute_shapes_and_shardings(model, make_mesh(2))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert {x.dtype.name for x in jax.tree.leaves(split_params(params)[0])} == {"float32"}
    kinds = {path[-1]: x.dtype.name for path, x in flatten_dict(split_params(params)[1]).items()}
    assert kinds == {"embedding": "bfloat16", "kernel": "int8", "kernel_scale": "float32", "scale": "float32"}


def test_a_peft_base_is_merged_before_it_is_quantized(base_folder: Folder, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, alpha=8.0, targets=("q_proj", "down_proj"))
    _, params = load_adapted(base_folder("qwen3"), lora)
    write_adapters(tmp_path, params, lora, str(base_folder("qwen3")))
    base, exact = find_base(str(tmp_path)), flatten_dict(merge_adapters(params, lora))
    model = EmbeddingModel(base.transformer, base.spec, lora=LoraConfig(rank=2, alpha=8.0, base_dtype="int8"))
    rounded = flatten_dict(base.load(*compute_shapes_and_shardings(model, make_mesh(1))))
    for path in (path for path in rounded if path[-1] == "kernel"):
        scale = rounded[*path[:-1], "kernel_scale"]
        error = np.abs(dequantize(rounded[path], scale) - exact[path])
        assert (error <= 0.501 * scale[:, None]).all(), path
