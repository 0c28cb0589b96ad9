"""Tiny models on the JAX side: read from the folders that `tiny` makes, run on packed texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.packing import PackedTexts, fill_rows, max_segments, pack_rows
from jaxembed.devices.mesh import logical_axis_table, make_mesh, param_shardings
from jaxembed.devices.placement import put_batch
from jaxembed.formats.weights import load_params
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel, init_params, parameter_shapes
from jaxembed.model.families import from_hf
from jaxembed.model.lora import LoRA


def load(
    folder: Path, spec: EmbeddingSpec, devices: int | Mesh = 1, lora: LoRA | None = None, **compute: Any
) -> tuple[EmbeddingModel, Any]:
    """The model of a folder under a spec, and its parameters on the first `devices`, or as a mesh splits them; random where the
    folder has none.
    """
    config = from_hf(json.loads((folder / "config.json").read_text()), str(folder))
    model = EmbeddingModel(config, spec, Compute(**compute), lora)
    boxed = parameter_shapes(model)
    mesh = make_mesh(devices) if isinstance(devices, int) else devices
    shardings = param_shardings(mesh, nn.get_partition_spec(boxed), logical_axis_table(mesh, config.axis_sizes))
    parts = [{"decoder": tree["decoder"]} for tree in (nn.unbox(boxed), shardings)]
    loaded = flatten_dict(load_params(folder, config.layers, *parts))
    absent = {path: sharding for path, sharding in flatten_dict(shardings).items() if path not in loaded}
    random = flatten_dict(init_params(model, jax.random.key(0), unflatten_dict(absent)))
    return model, unflatten_dict(loaded | random)


def draw_texts(lengths: Sequence[int], seed: int = 0, vocabulary: int = 300) -> list[np.ndarray]:
    """Random tokens of texts of these lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary, length).astype(np.int32) for length in lengths]


def in_rows(
    texts: Sequence[np.ndarray], row_length: int, pool_start: Sequence[int] | None = None, shards: int = 1
) -> tuple[PackedTexts, np.ndarray]:
    """Texts packed into rows, and each one's index among the vectors [R * S] that come out."""
    row, place, rows = pack_rows([len(text) for text in texts], row_length)
    shape = (-(-rows // shards) * shards, row_length)
    arrays = fill_rows(texts, [0] * len(texts) if pool_start is None else pool_start, row, place, shape)
    segments = max_segments(row_length)
    packed = PackedTexts(**arrays, segments=segments, shards=shards)
    return jax.tree.map(jnp.asarray, packed), row * segments + place


@functools.cache
def compiled(model: EmbeddingModel) -> Callable[..., jax.Array]:
    return jax.jit(model.apply)


def vectors(model: EmbeddingModel, params: Any, packed: PackedTexts, index: np.ndarray, devices: int = 1) -> np.ndarray:
    """The vectors [texts, D], in the order of the texts."""
    placed = put_batch(make_mesh(devices), packed)
    out = np.asarray(compiled(model)({"params": params}, placed))
    return out.reshape(-1, out.shape[-1])[index]


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the rows of two arrays of unit vectors."""
    return float(np.sum(a * b, axis=1).min())
