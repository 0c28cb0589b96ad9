#!/usr/bin/env python3
"""Measure the cost of a batch of tens of thousands of queries: of the loss alone, and of a whole step.

    python benchmarks/large_batch.py BASE DATA.jsonl [--batch-size 32768] [--rows 64] [--peer-batch-sizes 4096 32768]

BASE is a small decoder folder, DATA a JSONL file of at least --batch-size pairs. Prints three Markdown tables and, on the
last line, one JSON object:

1. Temporary memory of the loss and its gradient, as the compiler reports it: for several objectives computed block by block,
   and for InfoNCE on the whole score matrix ("plain"). Vectors have 256 dimensions, and each query has one document. On one
   device, and per device on a simulated mesh of 8.
2. Seconds of both at --timed queries, the median of 5 runs after the first.
3. One step of jaxembed (with gradcache.rows) and of sentence-transformers' trainer with
   CachedMultipleNegativesRankingLoss, each in its own process with all cores: seconds, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from script_runs import BENCHMARKS, run_script

from jaxembed.config import InfoNCEConfig
from jaxembed.config.objectives import Direction
from jaxembed.data.batch import Batch, FrozenVectors
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import make_batch_sharding
from jaxembed.losses.encoded import EncodedBatch
from jaxembed.losses.infonce import info_nce
from jaxembed.losses.negatives import collect_text_info, in_batch_candidates, is_known_positive
from jaxembed.training.metrics import read_metrics

WIDTH = 256
BATCH_SIZES = (4096, 16384, 65536)
MESH_DEVICES = 8
MESH_OPTION = "--on-mesh"  # of the process that simulates the devices
ALL_DIRECTIONS: tuple[Direction, ...] = typing.get_args(Direction)
VARIANTS = {
    "InfoNCE": InfoNCEConfig(),
    "GTE's four directions": InfoNCEConfig(directions=ALL_DIRECTIONS),
    "four directions, mask_same_label and margin": InfoNCEConfig(directions=ALL_DIRECTIONS, mask_same_label=True, margin=0.1),
    "with a guide": InfoNCEConfig(guide="a model"),
    "hardness and focal": InfoNCEConfig(hardness=9.0, hardness_of="all", focal=0.5),
}
Loss = Callable[[jax.Array, jax.Array, Batch], jax.Array]


def build_batch(count: int) -> tuple[jax.Array, jax.Array, Batch]:
    """Return random vectors, and a batch of distinct texts that they belong to.

    Returns:
        Queries [count, WIDTH] and documents [count, 1, WIDTH] of about unit length, and the batch, which has no tokens.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    q, d, guide_queries, guide_documents = (jax.random.normal(key, (count, 1, WIDTH)) / WIDTH**0.5 for key in keys)
    hashes = jnp.arange(4 * count, dtype=jnp.uint32).reshape(2, count, 2)
    documents = hashes[1][:, None]
    no_texts: Any = None
    batch = Batch(
        texts=no_texts, query_slot=jnp.arange(count), doc_slot=jnp.zeros((count, 1), jnp.int32), in_batch=jnp.ones(count, bool),
        query_hash=hashes[0], doc_hash=documents, positive_hash=documents, label=jnp.arange(count) % 100,
        source=jnp.zeros(count, jnp.int32), teacher_scores=jnp.zeros((count, 1)),
        score=jnp.full(count, jnp.nan), is_positive=jnp.ones(count, bool),
        guide=FrozenVectors(guide_queries[:, 0], guide_documents),
    )  # fmt: skip
    return q[:, 0], d, batch


def make_blockwise_loss(config: InfoNCEConfig, shards: int = 1) -> Loss:
    """Return the function that computes InfoNCE block by block."""

    def loss(q: jax.Array, d: jax.Array, batch: Batch) -> jax.Array:
        return info_nce(config, EncodedBatch(q, d, batch, jnp.full(len(q), 1 / len(q)), jax.random.key(0), shards))[0]

    return loss


def plain_loss(q: jax.Array, d: jax.Array, batch: Batch) -> jax.Array:
    """Compute InfoNCE on the whole score matrix."""
    query_texts, document_texts = collect_text_info(batch)
    queries, documents = query_texts.reshape(-1, 1), document_texts.reshape(-1)
    scores = (q @ d.reshape(-1, WIDTH).T) / 0.05
    keep = in_batch_candidates(queries, documents) & ~is_known_positive(queries, documents)
    positive = jnp.sum(q * d[:, 0], axis=-1) / 0.05
    return jnp.mean(jnp.logaddexp(positive, jax.nn.logsumexp(jnp.where(keep, scores, -1e30), axis=-1)) - positive)


def compile_gradient(loss: Loss, count: int) -> jax.stages.Compiled:
    """Compile the loss and its gradient for a batch that is split over all devices."""
    mesh = make_mesh()

    def shard(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=make_batch_sharding(mesh))

    with jax.set_mesh(mesh):
        shapes = jax.tree.map(shard, jax.eval_shape(lambda: build_batch(count)))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()


def measure_temporary_mib(loss: Loss, count: int) -> float:
    """Return the temporary memory per device in MiB, without inputs and outputs."""
    memory = compile_gradient(loss, count).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 2**20


def measure_seconds(loss: Loss, count: int) -> float:
    """Return the median seconds of 5 runs after the first."""
    run, arguments = compile_gradient(loss, count), build_batch(count)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_jaxembed_step(args: argparse.Namespace) -> dict[str, float]:
    """Return the batch size, the seconds, and the peak memory in GiB of a step of jaxembed."""
    tree = {
        "model": {"base": args.base, "attention": "causal", "pooling": {"kind": "mean"}, "append_eos": False},
        "data": {"max_length": args.max_length, "sources": [{"path": str(args.data)}]},
        "gradcache": {"rows": args.rows},
        "train": {"steps": 2, "batch_size": args.batch_size, "log_every": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.yaml"
        path.write_text(yaml.safe_dump(tree | {"run": {"dir": f"{folder}/run"}}))
        _, memory = run_script(["-m", "jaxembed.train", str(path)])
        rows = read_metrics(Path(folder) / "run")
    return {"batch_size": args.batch_size, "seconds": min(row["step_seconds"] for row in rows), "memory": memory}


def measure_sentence_transformers_step(args: argparse.Namespace, batch_size: int) -> dict[str, float]:
    """Return the batch size, the seconds, and the peak memory in GiB of a step of sentence-transformers' trainer."""
    script = str(BENCHMARKS / "finetune_sentence_transformers.py")
    options = [f"--batch-size={batch_size}", "--steps=1", "--mini-batch-size=64", f"--max-length={args.max_length}"]
    with tempfile.TemporaryDirectory() as folder:
        result, memory = run_script([script, args.base, str(args.data), f"{folder}/out", *options])
    return {"batch_size": batch_size, "seconds": result["seconds_per_step"], "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="small decoder folder")
    parser.add_argument("data", metavar="DATA.jsonl", type=Path, help="JSONL file of pairs")
    parser.add_argument("--batch-size", type=int, default=32768, help="queries per step of jaxembed (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="gradcache.rows (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per text (default: %(default)s)")
    parser.add_argument(
        "--peer-batch-sizes", type=int, nargs="*", default=[4096, 32768], help="queries per step of sentence-transformers"
    )
    parser.add_argument("--timed", type=int, default=8192, help="queries of the timed losses (default: %(default)s)")
    args = parser.parse_args()
    memory = print_memory()
    times = print_times(args.timed)
    steps = print_steps(args)
    print(json.dumps({"temporary_mib": memory, "seconds": times, "steps": steps}))


def print_memory() -> dict[str, list[float]]:
    """Print the table of temporary memory. Return its values in MiB for each of `BATCH_SIZES`, by name of the loss."""
    print("| loss and gradient | " + " | ".join(f"B = {size:,}" for size in BATCH_SIZES) + " |")
    print("|---|" + "---|" * len(BATCH_SIZES))
    memory = {"plain InfoNCE": [measure_temporary_mib(plain_loss, size) for size in BATCH_SIZES]}
    memory |= measure_blockwise_memory(shards=1)
    command = [sys.executable, __file__, MESH_OPTION]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={MESH_DEVICES}"}
    on_mesh = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    values_by_loss = json.loads(on_mesh.stdout.splitlines()[-1])
    memory |= {f"{name}, each of {MESH_DEVICES} devices": values for name, values in values_by_loss.items()}
    for name, values in memory.items():
        print(f"| {name} | " + " | ".join(f"{size:,.0f} MiB" for size in values) + " |")
    return memory


def measure_blockwise_memory(shards: int) -> dict[str, list[float]]:
    """Return the temporary memory per device in MiB for each of `BATCH_SIZES`, by name of the loss."""
    losses = {name: make_blockwise_loss(config, shards) for name, config in VARIANTS.items()}
    return {name: [measure_temporary_mib(loss, size) for size in BATCH_SIZES] for name, loss in losses.items()}


def print_times(count: int) -> dict[str, float]:
    """Print the table of seconds for `count` queries and return the seconds by name of the loss."""
    losses = {"plain": plain_loss, "blockwise": make_blockwise_loss(InfoNCEConfig())}
    times = {name: measure_seconds(loss, count) for name, loss in losses.items()}
    print(f"\n| InfoNCE, B = {count:,} | seconds |\n|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.3f} |")
    return times


def print_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table of whole steps and return its rows."""
    print("\n| step of | queries | seconds | peak memory |\n|---|---|---|---|", flush=True)
    measurements = [("jaxembed", partial(measure_jaxembed_step, args))]
    for size in args.peer_batch_sizes:
        measurements.append(("sentence-transformers", partial(measure_sentence_transformers_step, args, size)))
    steps: list[dict[str, Any]] = []
    for side, measure in measurements:
        step = measure()
        steps.append({"side": side, **step})
        print(f"| {side} | {step['batch_size']:,} | {step['seconds']:.1f} | {step['memory']:.2f} GiB |", flush=True)
    return steps


if __name__ == "__main__":
    if sys.argv[1:] == [MESH_OPTION]:
        print(json.dumps(measure_blockwise_memory(shards=MESH_DEVICES)))
    else:
        main()
