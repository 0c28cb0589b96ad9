"""Compile programs for four TPU v5e chips without a chip, and print their kernels, collectives and memory as JSON.

It runs in its own process because the compiler (libtpu) reads its environment when it is first loaded.
"""

from __future__ import annotations

import json
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.config import InfoNCEConfig, OptimConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import Batch
from jaxembed.data.packing import PackedTexts
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import make_batch_sharding, make_replicated_sharding
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.model.kernels import pick_kernel
from jaxembed.model.masks import MASKS, TokenInfo
from jaxembed.model.presets import find_preset
from jaxembed.model.transformer import ComputeOptions
from jaxembed.training.optim import make_optimizer, make_schedule
from jaxembed.training.step import TrainState, make_train_step

DEVICES = np.array(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
ROWS, TOKENS, QUERIES = 8, 200, 16


def make_shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def add_sharding(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def describe_program(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Return the kernels and collectives of a program, and the bytes of its temporary memory."""
    text = compiled.as_text()
    return {
        "kernels": sorted(set(re.findall(r"splash_mha_(fwd|dq|dkv)", text))),
        "collectives": sorted(set(re.findall(r" (all-\w+|reduce-scatter|collective-permute)", text))),
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
    }


def compile_attention() -> jax.stages.Compiled:
    """Compile attention and its gradient in bfloat16, with rows over one axis of the mesh and heads over the other."""
    mesh = Mesh(DEVICES.reshape(2, 2), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    q, k, v = (add_sharding(make_shape(ROWS, TOKENS, heads, 64, dtype=jnp.bfloat16), sharding) for heads in (8, 2, 2))
    numbers, flags = make_shape(ROWS, TOKENS), make_shape(ROWS, TOKENS, dtype=bool)
    token_info = add_sharding(TokenInfo(numbers, numbers, flags), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        kernel = pick_kernel("auto", 2)

        def total(q: jax.Array, k: jax.Array, v: jax.Array, token_info: TokenInfo) -> jax.Array:
            return kernel(q, k, v, token_info, MASKS["causal"], 100).astype(jnp.float32).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v, token_info).compile()


def make_batch_shapes() -> Batch:
    numbers, flags = make_shape(ROWS, TOKENS), make_shape(ROWS, TOKENS, dtype=bool)
    query_arrays = {name: make_shape(QUERIES) for name in ("query_slot", "label", "source")}
    return Batch(
        texts=PackedTexts(numbers, numbers, numbers, flags, segments=25, shards=4),
        doc_slot=make_shape(QUERIES, 2),
        in_batch=make_shape(QUERIES, dtype=bool),
        query_hash=make_shape(QUERIES, 2, dtype=jnp.uint32),
        doc_hash=make_shape(QUERIES, 2, 2, dtype=jnp.uint32),
        positive_hash=make_shape(QUERIES, 1, 2, dtype=jnp.uint32),
        teacher_scores=make_shape(QUERIES, 2, dtype=jnp.float32),
        score=make_shape(QUERIES, dtype=jnp.float32),
        is_positive=make_shape(QUERIES, dtype=bool),
        **query_arrays,
    )


def compile_step() -> jax.stages.Compiled:
    """Compile a training step in bfloat16, with rows and queries over all devices."""
    transformer = parse_hf_config({**find_preset("tiny"), "vocab_size": 300, "num_hidden_layers": 2}, "tiny")
    model = EmbeddingModel(transformer, EmbeddingSpec(), ComputeOptions(jnp.bfloat16, remat=True, unroll=False))
    mesh, optim = make_mesh(), OptimConfig()
    optimizer = make_optimizer(optim, 10)

    def init_state() -> TrainState:
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(infer_parameter_shapes(model)))
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))

    state = add_sharding(jax.eval_shape(init_state), make_replicated_sharding(mesh))
    with jax.set_mesh(mesh):
        train = make_train_step(model, Objectives([InfoNCEConfig()]), optimizer, make_schedule(optim, 10))
        return train.lower(state, add_sharding(make_batch_shapes(), make_batch_sharding(mesh))).compile()


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    jax.devices = lambda: list(DEVICES)
    programs = {"attention": compile_attention(), "step": compile_step()}
    print(json.dumps({name: describe_program(compiled) for name, compiled in programs.items()}))
