"""Tiny JAX models: loaded from the folders that `tiny` writes, and run on packed texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.packing import PackedTexts, compute_max_segments, fill_rows, pack_rows
from jaxembed.devices.mesh import make_logical_axis_table, make_mesh, make_param_shardings
from jaxembed.devices.placement import put_batch
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.formats.weights import load_params
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes, init_params
from jaxembed.model.transformer import ComputeOptions


def load_model(
    folder: Path,
    spec: EmbeddingSpec,
    devices: int | Mesh = 1,
    lora: LoraConfig | None = None,
    has_head: bool = False,
    **compute: Any,
) -> tuple[EmbeddingModel, Any]:
    """Load the model of a folder with a spec. Parameters that the folder does not have are drawn at random.

    Args:
        folder: Hugging Face folder of the decoder.
        spec: How texts become vectors.
        devices: Number of devices, or a mesh over which the parameters are split.
        lora: Adapters of the decoder, if any.
        has_head: Whether to load the folder's language-model head.
        **compute: Fields of `ComputeOptions`.
    """
    config = parse_hf_config(json.loads((folder / "config.json").read_text()), str(folder))
    model = EmbeddingModel(config, spec, ComputeOptions(**compute), lora, has_head)
    boxed = infer_parameter_shapes(model)
    mesh = make_mesh(devices) if isinstance(devices, int) else devices
    shardings = make_param_shardings(mesh, nn.get_partition_spec(boxed), make_logical_axis_table(mesh, config.axis_sizes))
    parts = [{part: tree[part] for part in ("decoder", "head") if part in tree} for tree in (nn.unbox(boxed), shardings)]
    loaded = flatten_dict(load_params(folder, config, *parts))
    absent = tuple((path, sharding) for path, sharding in flatten_dict(shardings).items() if path not in loaded)
    return model, unflatten_dict(loaded | draw_params(model, absent))


@functools.cache
def draw_params(model: EmbeddingModel, shardings: tuple[tuple[tuple[str, ...], NamedSharding], ...]) -> dict[Any, jax.Array]:
    """Draw random parameters, given their paths and shardings. Tests that need the same ones share them."""
    return flatten_dict(init_params(model, jax.random.key(0), unflatten_dict(dict(shardings))))


def draw_texts(lengths: Sequence[int], seed: int = 0, vocabulary: int = 300) -> list[np.ndarray]:
    """Draw the tokens of texts of these lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary, length).astype(np.int32) for length in lengths]


def pack_texts(
    texts: Sequence[np.ndarray], row_length: int, pool_start: Sequence[int] | None = None, shards: int = 1
) -> tuple[PackedTexts, np.ndarray]:
    """Pack texts into rows. Also return the index [texts] of each text among the vectors [R * S] of the model."""
    row, place, rows = pack_rows([len(text) for text in texts], row_length)
    shape = (-(-rows // shards) * shards, row_length)
    arrays = fill_rows(texts, [0] * len(texts) if pool_start is None else pool_start, row, place, shape)
    segments = compute_max_segments(row_length)
    packed = PackedTexts(**arrays, segments=segments, shards=shards)
    return jax.device_put(packed), row * segments + place


@functools.cache
def compile_apply(model: EmbeddingModel) -> Callable[..., jax.Array]:
    """Return a model's jitted `apply`. Equal models share one, so that it is compiled once."""
    return jax.jit(model.apply)


def encode_packed(model: EmbeddingModel, params: Any, packed: PackedTexts, index: np.ndarray, devices: int = 1) -> np.ndarray:
    """Return the vectors [texts, D] of texts in their order, given what `pack_texts` returned."""
    placed = put_batch(make_mesh(devices), packed)
    out = np.asarray(compile_apply(model)({"params": params}, placed))
    return out.reshape(-1, out.shape[-1])[index]


def min_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the least cosine of corresponding rows of two arrays [N, D] of unit vectors."""
    return float(np.sum(a * b, axis=1).min())
