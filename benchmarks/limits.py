#!/usr/bin/env python3
"""Where the time of a train step goes, each part beside what the machine allows.

    python benchmarks/limits.py BASE DATA.jsonl [--batch-size 64] [--max-length 256] [--rounds 5]

BASE is a decoder folder, DATA the main JSONL format. One batch is built as training builds it (causal, mean pooling, InfoNCE,
AdamW, float32), and the whole step and its parts, each compiled alone, are run in turn. A part's limit is the longer of
two times: its matrix products at the best rate that one product reaches here, and its inputs and outputs moved once at the
rate of adding two large arrays. The parts run apart from each other, so that what XLA fuses in the step is not seen.
Prints a Markdown table and, on the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxembed import cli
from jaxembed import config as configuration
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.sources import open_sources
from jaxembed.devices.cpu import compiler_options, retain_freed_memory
from jaxembed.devices.mesh import all_shards, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.hub.resolve import find_base
from jaxembed.hub.embedder import Embedder, from_base
from jaxembed.losses.objectives import Objectives
from jaxembed.model.decoder import ComputeOptions
from jaxembed.model.kernels import pick_kernel
from jaxembed.model.layers import RMSNorm, apply_rope, build_rope_table, compute_rope_frequencies
from jaxembed.model.masks import MASKS, TokenInfo
from jaxembed.model.matmul import sharded_matmul
from jaxembed.training.optim import learning_rate, make_optimizer
from jaxembed.training.step import TrainState, make_train_step

TRIES = 30  # of one product and of the addition, of which the best counts
WARMUPS = 2  # the first compiles, the second too where a result is not placed as the argument was
multiplied = functools.partial(sharded_matmul, fsdp_axis=0)  # x @ W as the model computes it
Part = tuple[Callable[[], Any], float, float]  # what to run, its matrix products' FLOPs, the bytes it must move


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = read_config(args)
    cli.set_up_jax()
    retain_freed_memory()
    mesh = make_mesh(1)
    base = find_base(args.base)
    spec = base.spec.with_choices(config.model, config.data.max_length)
    embedder = from_base(base, spec, ComputeOptions(), mesh)
    sources = open_sources(config.data, Path(tempfile.gettempdir()))
    sampler = BatchSampler(sources=sources, tokenizer=embedder.tokenizer, hard_negatives=0, seed=0)
    build = BatchBuilder(sampler=sampler, row_length=config.row_length, shards=all_shards(1))
    plan = BatchPlan(sources, config.train.batch_size, 0)
    host = build(0, np.asarray(plan[0]))
    batch = put_batch(mesh, host.batch)

    parts: dict[str, Part] = {
        "one matrix product": largest_product(embedder, batch),
        "adding two arrays": addition(),
        "batch on the host": (lambda: build(1, np.asarray(plan[1])), 0, 0),
        "projections": projections(embedder, batch),
        "attention": attention(embedder, batch),
        "norms, rotation, gate": pointwise(embedder, batch),
        "embedding and its gradient": embedding(embedder, batch),
        "loss": loss(config, embedder, batch),
        "optimizer": optimizer(config, embedder),
        "whole step": whole_step(config, embedder, batch),
    }
    seconds = {name: statistics.median(times) for name, times in in_turn(parts, args.rounds).items()}
    machine = {name: parts[name] for name in ("one matrix product", "adding two arrays")}
    seconds |= {name: min(times) for name, times in in_turn(machine, TRIES).items()}
    report(parts, seconds, host)


def read_config(args: argparse.Namespace) -> configuration.Config:
    tree = {
        "model": {"base": args.base, "attention": "causal", "pooling": {"kind": "mean"}},
        "data": {"max_length": args.max_length, "sources": [{"path": args.data}]},
        "train": {"batch_size": args.batch_size},
    }
    return configuration.parse_config(tree, "benchmark")


def in_turn(parts: dict[str, Part], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(WARMUPS + rounds):
        for name, (run, _, _) in parts.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - began)
    return {name: of_part[WARMUPS:] for name, of_part in times.items()}


def compiled(run: Callable[..., Any], *arrays: Any, flops: float = 0) -> Part:
    """A function of arrays as a part; the bytes are those of its arrays and results."""
    moved = sum(x.nbytes for x in jax.tree.leaves(arrays))
    moved += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(run, *arrays)))
    jitted = jax.jit(run, compiler_options=compiler_options())
    return lambda: jitted(*arrays), flops, moved


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def largest_product(embedder: Embedder, batch: Any) -> Part:
    c, tokens = embedder.model.decoder, batch.texts.tokens.size
    flops = 2 * tokens * c.width * c.mlp_width
    return compiled(multiplied, normal(tokens, c.width), normal(c.width, c.mlp_width), flops=flops)


def addition() -> Part:
    return compiled(jnp.add, normal(1 << 26), normal(1 << 26))


def kernels(embedder: Embedder) -> Iterator[jax.Array]:
    for path, x in jax.tree_util.tree_leaves_with_path(embedder.params["decoder"]["layers"]):
        if path[-1].key == "kernel":
            yield from x


def projections(embedder: Embedder, batch: Any) -> Part:
    """x @ W of every layer, the gradient of x and that of W, one product after the other."""
    weights, tokens = list(kernels(embedder)), batch.texts.tokens.size
    inputs = {width: normal(tokens, width) for weight in weights for width in weight.shape}

    @jax.jit
    def one(x: jax.Array, weight: jax.Array, of_y: jax.Array) -> Any:
        y, back = jax.vjp(multiplied, x, weight)
        return y, back(of_y)

    def run() -> None:
        for weight in weights:
            jax.block_until_ready(one(inputs[weight.shape[0]], weight, inputs[weight.shape[1]]))

    count = sum(weight.size for weight in weights)
    moved = sum(3 * 4 * (tokens * sum(weight.shape) + weight.size) for weight in weights)
    return run, 6 * count * tokens, moved


def attention(embedder: Embedder, batch: Any) -> Part:
    """Scores, softmax and mixing of every layer, forward and backward, with the scores computed twice."""
    c, texts = embedder.model.decoder, batch.texts
    rows, length = texts.tokens.shape
    token_info = TokenInfo(texts.segment_ids, texts.positions, texts.pool_mask)
    q, k, v = normal(rows, length, c.heads, c.head_width), *(normal(rows, length, c.kv_heads, c.head_width) for _ in "kv")
    attend = pick_kernel("auto", 1)

    def all_layers(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            sums = [attend(q + i, k, v, token_info, MASKS["causal"], None).sum() for i in range(c.layers)]
            return jnp.stack(sums).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    flops = 2 * rows * length**2 * c.heads * c.head_width * c.layers * 8
    run, _, moved = compiled(all_layers, q, k, v)
    return run, flops, moved * c.layers


def pointwise(embedder: Embedder, batch: Any) -> Part:
    """Both norms, the rotation of queries and keys, and the gate of every layer, forward and backward."""
    c, texts = embedder.model.decoder, batch.texts
    rows, length = texts.tokens.shape
    x, gate, up = normal(rows * length, c.width), *(normal(rows * length, c.mlp_width) for _ in "gu")
    heads = normal(rows, length, c.heads + c.kv_heads, c.head_width)
    norm, scale = RMSNorm(c.norm_epsilon, jnp.float32), {"params": {"scale": jnp.ones(c.width)}}
    frequencies = compute_rope_frequencies(c.head_width, c.rope_theta, dict(c.rope_scaling))
    rope = build_rope_table(texts.positions, frequencies, jnp.float32)

    def one_layer(x: jax.Array, heads: jax.Array, gate: jax.Array, up: jax.Array) -> Any:
        def values(x: jax.Array, heads: jax.Array, gate: jax.Array, up: jax.Array) -> Any:
            return norm.apply(scale, x), norm.apply(scale, x + 1), apply_rope(heads, *rope), jax.nn.silu(gate) * up

        out, back = jax.vjp(values, x, heads, gate, up)
        return out, back(out)

    run, _, moved = compiled(one_layer, x, heads, gate, up)
    return lambda: [run() for _ in range(c.layers)], 0, moved * c.layers


def embedding(embedder: Embedder, batch: Any) -> Part:
    tokens, table = batch.texts.tokens.reshape(-1), embedder.params["decoder"]["embedding"]

    def gather(table: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.vdot(table[tokens], weight)

    run, _, _ = compiled(jax.grad(gather), table, normal(tokens.size, table.shape[1]))
    return run, 0, table.nbytes + 3 * tokens.size * table.shape[1] * 4  # the table is not read whole


def loss(config: configuration.Config, embedder: Embedder, batch: Any) -> Part:
    objectives = Objectives(config.objectives)
    queries, documents = batch.query_slot.size, batch.doc_slot.size
    width = embedder.model.decoder.width

    def value(queries: jax.Array, documents: jax.Array) -> jax.Array:
        return objectives(queries, documents, batch, jax.random.key(0), {}, 1)[0]

    vectors = normal(queries, width), normal(*batch.doc_slot.shape, width)
    return compiled(jax.grad(value, (0, 1)), *vectors, flops=6 * queries * documents * width)


def optimizer(config: configuration.Config, embedder: Embedder) -> Part:
    """AdamW over every parameter: gradient, two moments and parameters read, the last three written."""
    update, params = make_optimizer(config.optim, config.train.steps), embedder.params
    grads = jax.tree.map(lambda x: 1e-3 * x, params)

    def apply(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = update.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(apply, donate_argnums=(0, 1), compiler_options=compiler_options())
    held = [jax.tree.map(jnp.copy, params), update.init(params)]

    def run() -> Any:
        held[:] = jitted(*held, grads)
        return held[0]

    return run, 0, 7 * sum(x.nbytes for x in jax.tree.leaves(params))


def whole_step(config: configuration.Config, embedder: Embedder, batch: Any) -> Part:
    update = make_optimizer(config.optim, config.train.steps)
    schedule = learning_rate(config.optim, config.train.steps)
    step = make_train_step(embedder.model, Objectives(config.objectives), update, schedule)
    params = jax.tree.map(jnp.copy, embedder.params)
    held = [TrainState(params, update.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))]

    def run() -> Any:
        held[0], metrics = step(held[0], batch)
        return metrics

    return run, 0, 0


def report(parts: dict[str, Part], seconds: dict[str, float], host: Any) -> None:
    rate = parts["one matrix product"][1] / seconds["one matrix product"]
    bandwidth = parts["adding two arrays"][2] / seconds["adding two arrays"]
    step = seconds["whole step"]
    print(f"{host.padded_tokens} tokens, {host.useful_tokens} of them useful; ", end="")
    print(f"a product {rate / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s\n")
    print("| part | seconds | of the step | limit, seconds | limit / time |\n|---|---|---|---|---|")
    rows = {}
    for name, (_, flops, moved) in parts.items():
        limit = max(flops / rate, moved / bandwidth)
        rows[name] = {"seconds": seconds[name], "limit": limit}
        told = f"{limit:.3f} | {limit / seconds[name]:.2f}" if limit else "|"
        print(f"| {name} | {seconds[name]:.3f} | {seconds[name] / step:.2f} | {told} |")
    print(json.dumps({"gflops": rate / 1e9, "gbytes_per_second": bandwidth / 1e9, "parts": rows}))


if __name__ == "__main__":
    main()
