"""Programs for four TPU v5e chips, compiled by the real compiler, without a chip: prints what they call and hold, as JSON.

It runs in a process of its own, for the compiler (libtpu) wants its environment set before anything loads it.
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
from jaxembed.devices.placement import batch_sharding, replicated_sharding
from jaxembed.losses.objectives import Objectives
from jaxembed.model.decoder import Compute
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.families import from_hf, preset
from jaxembed.model.kernels import pick_kernel
from jaxembed.model.masks import MASKS, TokenInfo
from jaxembed.training.optim import learning_rate, make_optimizer
from jaxembed.training.step import TrainState, make_train_step

DEVICES = np.array(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
ROWS, TOKENS, QUERIES = 8, 200, 16


def shape(*of: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(of, dtype)


def placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def report(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """The kernels that a program calls, what crosses devices, and the bytes that it takes beside its arguments."""
    text = compiled.as_text()
    return {
        "kernels": sorted(set(re.findall(r"splash_mha_(fwd|dq|dkv)", text))),
        "collectives": sorted(set(re.findall(r" (all-\w+|reduce-scatter|collective-permute)", text))),
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
    }


def attention() -> jax.stages.Compiled:
    """Forward and backward in bfloat16, rows over one axis of the mesh and heads over the other."""
    mesh = Mesh(DEVICES.reshape(2, 2), ("data", "tensor"))
    by_head = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    q, k, v = (placed(shape(ROWS, TOKENS, heads, 64, dtype=jnp.bfloat16), by_head) for heads in (8, 2, 2))
    numbers, flags = shape(ROWS, TOKENS), shape(ROWS, TOKENS, dtype=bool)
    places = placed(TokenInfo(numbers, numbers, flags), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        kernel = pick_kernel("auto", 2)

        def total(q: jax.Array, k: jax.Array, v: jax.Array, places: TokenInfo) -> jax.Array:
            return kernel(q, k, v, places, MASKS["causal"], 100).astype(jnp.float32).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v, places).compile()


def batch() -> Batch:
    numbers, flags = shape(ROWS, TOKENS), shape(ROWS, TOKENS, dtype=bool)
    of_queries = {name: shape(QUERIES) for name in ("query_slot", "label", "source")}
    return Batch(
        texts=PackedTexts(numbers, numbers, numbers, flags, segments=25, shards=4),
        doc_slot=shape(QUERIES, 2),
        in_batch=shape(QUERIES, dtype=bool),
        query_hash=shape(QUERIES, 2, dtype=jnp.uint32),
        doc_hash=shape(QUERIES, 2, 2, dtype=jnp.uint32),
        positive_hash=shape(QUERIES, 1, 2, dtype=jnp.uint32),
        teacher_scores=shape(QUERIES, 2, dtype=jnp.float32),
        **of_queries,
    )


def step() -> jax.stages.Compiled:
    """A training step in bfloat16, rows and queries over all devices."""
    decoder = from_hf({**preset("tiny"), "vocab_size": 300, "num_hidden_layers": 2}, "tiny")
    model = EmbeddingModel(decoder, EmbeddingSpec(), Compute(jnp.bfloat16, remat=True, unroll=False))
    mesh, optim = make_mesh(), OptimConfig()
    optimizer = make_optimizer(optim, 10)

    def first() -> TrainState:
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(parameter_shapes(model)))
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))

    state = placed(jax.eval_shape(first), replicated_sharding(mesh))
    with jax.set_mesh(mesh):
        train = make_train_step(model, Objectives([InfoNCEConfig()]), optimizer, learning_rate(optim, 10))
        return train.lower(state, placed(batch(), batch_sharding(mesh))).compile()


if __name__ == "__main__":
    jax.devices = lambda: list(DEVICES)
    programs = {"attention": attention(), "step": step()}
    print(json.dumps({name: report(compiled) for name, compiled in programs.items()}))
