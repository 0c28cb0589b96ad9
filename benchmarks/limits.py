#!/usr/bin/env python3
"""Measure where the time of a train step goes, and compare each part with the limit of the machine.

    python benchmarks/limits.py BASE DATA.jsonl [--batch-size 64] [--max-length 256] [--rounds 5] [--dtypes] [--embeddings]

BASE is a decoder folder, DATA a JSONL file of pairs. The script builds one batch as training does (causal attention, mean
pooling, InfoNCE, AdamW, float32). Then it runs the whole step and its parts in turn, each compiled on its own. The limit of
a part is the longer of two times: its matmuls at the best rate of one large matmul, and its inputs and outputs moved once at
the rate of adding two large arrays. Because the parts run separately, they do not show what XLA fuses in the whole step.
With --dtypes it only runs the step and the forward pass, each in float32 and bfloat16. With --embeddings it only runs
what a step does with the token embedding (lookup, gradient and AdamW): dense, lazy (`optim.lazy_embedding`), and frozen
(`model.frozen`).

Prints token counts and rates of the machine, a Markdown table (seconds, fraction of the step, limit, fraction of the limit)
and, on the last line, one JSON object.
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxembed import cli
from jaxembed.config import Config, parse_config
from jaxembed.data.batch import BatchBuilder
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.sources import open_sources
from jaxembed.devices.cpu import get_compiler_options, retain_freed_memory
from jaxembed.devices.mesh import make_all_shards, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.hub.embedder import Embedder, load_embedder
from jaxembed.hub.resolve import find_base
from jaxembed.losses.objectives import Objectives
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.kernels import pick_kernel
from jaxembed.model.layers import RMSNorm, apply_rope, build_rope_table, compute_rope_frequencies
from jaxembed.model.masks import MASKS, TokenInfo
from jaxembed.model.matmul import sharded_matmul
from jaxembed.model.transformer import ComputeOptions
from jaxembed.training.embedding_rows import list_embedding_rows, pick_rows, put_rows, select_rows
from jaxembed.training.optim import make_optimizer, make_schedule
from jaxembed.training.step import TrainState, make_train_step

MACHINE_ROUNDS = 30  # runs of the matmul and the addition that measure the machine; the fastest run counts
# The first round compiles. The second may compile too, if a result has a different sharding from the argument that it replaces.
WARMUP_ROUNDS = 2
model_matmul = functools.partial(sharded_matmul, fsdp_axis=0)  # x @ W as the model computes it
LARGEST_MATMUL, ADDITION = "one matmul", "adding two arrays"  # the parts that measure the machine
WHOLE_STEP = "whole step"


class Part(NamedTuple):
    """A part of a train step.

    Attributes:
        run: Runs it.
        flops: FLOPs of its matmuls.
        bytes_moved: Bytes of its inputs and outputs.
    """

    run: Callable[[], Any]
    flops: float = 0
    bytes_moved: float = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="decoder folder")
    parser.add_argument("data", metavar="DATA.jsonl", help="JSONL file of pairs")
    parser.add_argument("--batch-size", type=int, default=64, help="queries per step (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens per text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each part; the median counts (default: %(default)s)")
    parser.add_argument(
        "--dtypes", action="store_true", help="only compare the step and the forward pass in float32 and bfloat16"
    )
    parser.add_argument("--embeddings", action="store_true", help="only compare ways to train the token embedding")
    args = parser.parse_args()
    config = build_config(args)
    cli.set_up_jax()
    retain_freed_memory()
    mesh = make_mesh(1)
    base = find_base(args.base)
    spec = base.spec.apply_model_config(config.model, config.data.max_length)
    embedder = load_embedder(base, spec, ComputeOptions(), mesh)
    sources = open_sources(config.data, Path(tempfile.gettempdir()))
    sampler = BatchSampler(sources=sources, tokenizer=embedder.tokenizer, hard_negatives=0, seed=0)
    build_batch = BatchBuilder(sampler=sampler, row_length=config.row_length, shards=make_all_shards(1))
    plan = BatchPlan(sources, config.train.batch_size, 0)
    host_batch = build_batch(0, np.asarray(plan[0]))
    batch = put_batch(mesh, host_batch.batch)

    parts: dict[str, Part] = {LARGEST_MATMUL: build_largest_matmul(embedder, batch), ADDITION: build_addition()}
    if args.dtypes:
        parts |= build_dtypes(config, embedder, batch)
    elif args.embeddings:
        parts |= build_embedding_updates(config, embedder, batch)
    else:
        parts |= {
            "batch on the host": Part(lambda: build_batch(1, np.asarray(plan[1]))),
            "projections": build_projections(embedder, batch),
            "attention": build_attention(embedder, batch),
            "norms, rotation, gate": build_pointwise(embedder, batch),
            "embedding and its gradient": build_embedding(embedder, batch),
            "loss": build_loss(config, embedder, batch),
            "optimizer": build_optimizer(config, embedder),
            WHOLE_STEP: build_whole_step(config, embedder.model, embedder.params, batch),
        }
    seconds = {name: statistics.median(times) for name, times in time_in_turns(parts, args.rounds).items()}
    machine = {name: parts[name] for name in (LARGEST_MATMUL, ADDITION)}
    seconds |= {name: min(times) for name, times in time_in_turns(machine, MACHINE_ROUNDS).items()}
    print_report(parts, seconds, host_batch)


def build_config(args: argparse.Namespace) -> Config:
    """Return the config of the run whose step is measured."""
    tree = {
        "model": {"base": args.base, "attention": "causal", "pooling": {"kind": "mean"}},
        "data": {"max_length": args.max_length, "sources": [{"path": args.data}]},
        "train": {"batch_size": args.batch_size},
    }
    return parse_config(tree, "benchmark")


def time_in_turns(parts: dict[str, Part], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each part in each round, after the warmup rounds."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(WARMUP_ROUNDS + rounds):
        for name, part in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(part.run())
            times[name].append(time.perf_counter() - start)
    return {name: part_times[WARMUP_ROUNDS:] for name, part_times in times.items()}


def jit_part(run: Callable[..., Any], *arrays: Any, flops: float = 0) -> Part:
    """Return the part that runs a jitted function on arrays. The bytes that it must move are those of arguments and results."""
    bytes_moved = sum(x.nbytes for x in jax.tree.leaves(arrays))
    bytes_moved += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(run, *arrays)))
    jitted = jax.jit(run, compiler_options=get_compiler_options())
    return Part(lambda: jitted(*arrays), flops, bytes_moved)


def draw_normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def build_largest_matmul(embedder: Embedder, batch: Any) -> Part:
    """Build one matmul of the size of the gate projection. It measures the rate of the machine."""
    c, tokens = embedder.model.transformer, batch.texts.tokens.size
    flops = 2 * tokens * c.width * c.mlp_width
    return jit_part(model_matmul, draw_normal(tokens, c.width), draw_normal(c.width, c.mlp_width), flops=flops)


def build_addition() -> Part:
    """Build the addition of two arrays of 256 MiB. It measures the memory bandwidth of the machine."""
    return jit_part(jnp.add, draw_normal(1 << 26), draw_normal(1 << 26))


def iter_kernels(embedder: Embedder) -> Iterator[jax.Array]:
    """Yield the kernels of all layers."""
    for path, x in jax.tree_util.tree_leaves_with_path(embedder.params["decoder"]["layers"]):
        if path[-1].key == "kernel":
            yield from x


def build_projections(embedder: Embedder, batch: Any) -> Part:
    """Build x @ W of all layers with the gradients of x and W, one projection after the other."""
    weights, tokens = list(iter_kernels(embedder)), batch.texts.tokens.size
    inputs = {width: draw_normal(tokens, width) for weight in weights for width in weight.shape}

    @jax.jit
    def run_one(x: jax.Array, weight: jax.Array, y_gradient: jax.Array) -> Any:
        y, backward = jax.vjp(model_matmul, x, weight)
        return y, backward(y_gradient)

    def run() -> None:
        for weight in weights:
            jax.block_until_ready(run_one(inputs[weight.shape[0]], weight, inputs[weight.shape[1]]))

    count = sum(weight.size for weight in weights)
    bytes_moved = sum(3 * 4 * (tokens * sum(weight.shape) + weight.size) for weight in weights)
    return Part(run, 6 * count * tokens, bytes_moved)


def build_attention(embedder: Embedder, batch: Any) -> Part:
    """Build attention of all layers, forward and backward."""
    c, texts = embedder.model.transformer, batch.texts
    rows, length = texts.tokens.shape
    token_info = TokenInfo(texts.segment_ids, texts.positions, texts.pool_mask)
    q, k, v = (draw_normal(rows, length, heads, c.head_width) for heads in (c.heads, c.kv_heads, c.kv_heads))
    attend = pick_kernel("auto", 1)

    def all_layers(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            sums = [attend(q + i, k, v, token_info, MASKS["causal"], None).sum() for i in range(c.layers)]
            return jnp.stack(sums).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    # 8 matmuls per layer: 2 forward, 2 for the forward pass that is recomputed, 4 backward.
    flops = 2 * rows * length**2 * c.heads * c.head_width * c.layers * 8
    part = jit_part(all_layers, q, k, v, flops=flops)
    return part._replace(bytes_moved=part.bytes_moved * c.layers)


def build_pointwise(embedder: Embedder, batch: Any) -> Part:
    """Build both norms, RoPE on queries and keys, and the gate of all layers, forward and backward."""
    c, texts = embedder.model.transformer, batch.texts
    rows, length = texts.tokens.shape
    x, gate, up = (draw_normal(rows * length, width) for width in (c.width, c.mlp_width, c.mlp_width))
    heads = draw_normal(rows, length, c.heads + c.kv_heads, c.head_width)
    norm, scale = RMSNorm(c.norm_epsilon, jnp.float32), {"params": {"scale": jnp.ones(c.width)}}
    frequencies = compute_rope_frequencies(c.head_width, c.rope_theta, dict(c.rope_scaling))
    rope = build_rope_table(texts.positions, frequencies, jnp.float32)

    def one_layer(x: jax.Array, heads: jax.Array, gate: jax.Array, up: jax.Array) -> Any:
        def values(x: jax.Array, heads: jax.Array, gate: jax.Array, up: jax.Array) -> Any:
            return norm.apply(scale, x), norm.apply(scale, x + 1), apply_rope(heads, *rope), jax.nn.silu(gate) * up

        out, backward = jax.vjp(values, x, heads, gate, up)
        return out, backward(out)

    layer = jit_part(one_layer, x, heads, gate, up)
    return Part(lambda: [layer.run() for _ in range(c.layers)], bytes_moved=layer.bytes_moved * c.layers)


def build_embedding(embedder: Embedder, batch: Any) -> Part:
    """Build the embedding lookup of all tokens, and the gradient with respect to the table."""
    tokens, table = batch.texts.tokens.reshape(-1), embedder.params["decoder"]["embedding"]

    def weighted_sum(table: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.vdot(table[tokens], weight)

    part = jit_part(jax.grad(weighted_sum), table, draw_normal(tokens.size, table.shape[1]))
    # Most rows of the table are not read, but the gradient has all of them.
    return part._replace(bytes_moved=table.nbytes + 3 * tokens.size * table.shape[1] * 4)


def build_loss(config: Config, embedder: Embedder, batch: Any) -> Part:
    """Build the gradients of the objectives with respect to the vectors of queries and documents."""
    objectives = Objectives(config.objectives)
    queries, documents = batch.query_slot.size, batch.doc_slot.size
    width = embedder.model.transformer.width

    def value(queries: jax.Array, documents: jax.Array) -> jax.Array:
        return objectives(queries, documents, batch, jax.random.key(0), {}, 1)[0]

    vectors = draw_normal(queries, width), draw_normal(*batch.doc_slot.shape, width)
    return jit_part(jax.grad(value, (0, 1)), *vectors, flops=6 * queries * documents * width)


def build_optimizer(config: Config, embedder: Embedder) -> Part:
    """Build an AdamW step over all parameters. It reads gradients, two moments and parameters, and writes the last three."""
    update, params = make_optimizer(config.optim, config.train.steps), embedder.params
    grads = jax.tree.map(lambda x: 1e-3 * x, params)

    def apply(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = update.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(apply, donate_argnums=(0, 1), compiler_options=get_compiler_options())
    state = [jax.tree.map(jnp.copy, params), update.init(params)]

    def run() -> Any:
        state[:] = jitted(*state, grads)  # the arguments are donated
        return state[0]

    return Part(run, bytes_moved=7 * sum(x.nbytes for x in jax.tree.leaves(params)))


def build_whole_step(config: Config, model: EmbeddingModel, params: Any, batch: Any) -> Part:
    """Build the training step itself. No limit is computed for it."""
    update = make_optimizer(config.optim, config.train.steps)
    schedule = make_schedule(config.optim, config.train.steps)
    step = make_train_step(model, Objectives(config.objectives), update, schedule)
    params = jax.tree.map(jnp.copy, params)
    state = [TrainState(params, update.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))]

    def run() -> Any:
        state[0], metrics = step(state[0], batch)
        return metrics

    return Part(run)


def build_dtypes(config: Config, embedder: Embedder, batch: Any) -> dict[str, Part]:
    """Build the training step and the forward pass in float32 and in bfloat16."""
    parts, options = {}, get_compiler_options()
    for dtype, suffix in ((jnp.float32, ""), (jnp.bfloat16, ", bfloat16")):
        model = embedder.model.clone(compute=ComputeOptions(dtype=dtype))
        encode = jax.jit(lambda params, model=model: model.apply({"params": params}, batch.texts), compiler_options=options)
        parts[WHOLE_STEP + suffix] = build_whole_step(config, model, embedder.params, batch)
        parts["forward pass" + suffix] = Part(functools.partial(encode, embedder.params))
    return parts


def build_embedding_updates(config: Config, embedder: Embedder, batch: Any) -> dict[str, Part]:
    """Build the lookup, the gradient and the AdamW update of the token embedding alone, dense, lazy and frozen.

    They share one state: memory may have room for only one table with its moments. The last part is the dense one,
    `WHOLE_STEP`: the report gives fractions of it.
    """
    update, model = make_optimizer(config.optim, config.train.steps), embedder.model
    params = {"decoder": {"embedding": jnp.copy(embedder.params["decoder"]["embedding"])}}
    weight = draw_normal(batch.texts.tokens.size, model.transformer.width)
    state = [params, update.init(params)]

    def compute_loss(params: Any, texts: Any) -> jax.Array:
        return jnp.vdot(params["decoder"]["embedding"][texts.tokens.reshape(-1)], weight)

    def train(params: Any, opt_state: Any, batch: Any, is_lazy: bool) -> tuple[Any, Any, jax.Array]:
        rows, step_batch = None, batch
        if is_lazy:
            rows = list_embedding_rows(model, batch)
            _, step_batch = select_rows(model, batch, rows)
        row_params, row_state = pick_rows((params, opt_state), rows)
        loss, grads = jax.value_and_grad(compute_loss)(row_params, step_batch.texts)
        updates, row_state = update.update(grads, row_state, row_params)
        return *put_rows((params, opt_state), rows, (optax.apply_updates(row_params, updates), row_state)), loss

    def make_part(is_lazy: bool) -> Part:
        options = get_compiler_options()
        jitted = jax.jit(train, donate_argnums=(0, 1), static_argnums=3, compiler_options=options)

        def run() -> jax.Array:
            *state[:], loss = jitted(*state, batch, is_lazy)
            return jax.block_until_ready((*state, loss))[-1]

        return Part(run)

    look_up = jax.jit(compute_loss, compiler_options=get_compiler_options())
    frozen = Part(lambda: look_up(state[0], batch.texts))
    return {"embedding, lazy": make_part(is_lazy=True), "embedding, frozen": frozen, WHOLE_STEP: make_part(is_lazy=False)}


def print_report(parts: dict[str, Part], seconds: dict[str, float], host_batch: Any) -> None:
    """Print token counts, the rates of the machine, and the time and limit of each part."""
    rate = parts[LARGEST_MATMUL].flops / seconds[LARGEST_MATMUL]
    bandwidth = parts[ADDITION].bytes_moved / seconds[ADDITION]
    step = seconds[WHOLE_STEP]
    print(f"{host_batch.padded_tokens} tokens, {host_batch.useful_tokens} of them useful; ", end="")
    print(f"a matmul {rate / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s\n")
    print("| part | seconds | fraction of the step | limit, seconds | limit / time |\n|---|---|---|---|---|")
    rows = {}
    for name, part in parts.items():
        limit = max(part.flops / rate, part.bytes_moved / bandwidth)
        rows[name] = {"seconds": seconds[name], "limit": limit}
        cells = f"{limit:.3f} | {limit / seconds[name]:.2f}" if limit else "|"
        print(f"| {name} | {seconds[name]:.3f} | {seconds[name] / step:.2f} | {cells} |")
    print(json.dumps({"gflops": rate / 1e9, "gbytes_per_second": bandwidth / 1e9, "parts": rows}))


if __name__ == "__main__":
    main()
