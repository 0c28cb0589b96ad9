#!/usr/bin/env python3
"""What a batch of tens of thousands of queries costs: the loss by itself, and one whole step.

    python benchmarks/large_batch.py BASE DATA.jsonl [--batch-size 32768] [--rows 64] [--peer-batch-sizes 4096 32768]

BASE is a small decoder folder, DATA the main JSONL format with at least --batch-size lines. Prints three Markdown tables
and, on the last line, one JSON object:

1. temporary memory of the loss's value and gradient, by the compiler's own count, block by block for several objectives,
   and where all pairs are held at once ("plain"); vectors of 256 numbers, one document a query; on one device, and of each
   device of a simulated mesh of 8;
2. seconds of both at --timed queries, the median of 5 after the first;
3. a step of jaxembed (gradcache.rows) and of sentence-transformers' trainer with CachedMultipleNegativesRankingLoss, each in
   its own process with every core: seconds, and the peak memory of the process.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from vs_sentence_transformers import measured

from jaxembed.config import InfoNCEConfig
from jaxembed.data.batch import Batch, FrozenVectors
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import batch_sharding
from jaxembed.losses.encoded import Encoded
from jaxembed.losses.infonce import info_nce
from jaxembed.losses.negatives import in_batch_candidates, known_positive, texts_of
from jaxembed.training.metrics import read_metrics

WIDTH = 256
SIZES = (4096, 16384, 65536)
EIGHT = "--xla_force_host_platform_device_count=8"
ALL = ("query_document", "query_query", "document_query", "document_document")
VARIANTS = {
    "InfoNCE": InfoNCEConfig(),
    "GTE's four directions": InfoNCEConfig(directions=ALL),
    "four, by label and margin": InfoNCEConfig(directions=ALL, mask_same_label=True, margin=0.1),
    "with a guide": InfoNCEConfig(guide="a model"),
    "hardness and focal": InfoNCEConfig(hardness=9.0, hardness_of="all", focal=0.5),
}
Loss = Callable[[jax.Array, jax.Array, Batch], jax.Array]


def a_batch(count: int) -> tuple[jax.Array, jax.Array, Batch]:
    """Random unit vectors of queries and documents, and texts that are all different."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, d, of_queries, of_documents = (jax.random.normal(key, (count, 1, WIDTH)) / WIDTH**0.5 for key in keys)
    hashes = jnp.arange(4 * count, dtype=jnp.uint32).reshape(2, count, 2)
    documents = hashes[1][:, None]
    no_texts: Any = None
    batch = Batch(
        texts=no_texts, query_slot=jnp.arange(count), doc_slot=jnp.zeros((count, 1), jnp.int32), in_batch=jnp.ones(count, bool),
        query_hash=hashes[0], doc_hash=documents, positive_hash=documents, label=jnp.arange(count) % 100,
        source=jnp.zeros(count, jnp.int32), teacher_scores=jnp.zeros((count, 1)),
        guide=FrozenVectors(of_queries[:, 0], of_documents),
    )  # fmt: skip
    return q[:, 0], d, batch


def blockwise(config: InfoNCEConfig, shards: int = 1) -> Loss:
    def loss(q: jax.Array, d: jax.Array, batch: Batch) -> jax.Array:
        return info_nce(config, Encoded(q, d, batch, jnp.full(len(q), 1 / len(q)), jax.random.key(0), shards))[0]

    return loss


def plain(q: jax.Array, d: jax.Array, batch: Batch) -> jax.Array:
    """InfoNCE with all pairs held at once."""
    of_queries, of_documents = texts_of(batch)
    queries, documents = of_queries.reshape(-1, 1), of_documents.reshape(-1)
    scores = (q @ d.reshape(-1, WIDTH).T) / 0.05
    keep = in_batch_candidates(queries, documents) & ~known_positive(queries, documents)
    positive = jnp.sum(q * d[:, 0], axis=-1) / 0.05
    return jnp.mean(jnp.logaddexp(positive, jax.nn.logsumexp(jnp.where(keep, scores, -1e30), axis=-1)) - positive)


def compiled(loss: Loss, count: int) -> jax.stages.Compiled:
    """The program of value and gradient, for queries that all devices share."""
    mesh = make_mesh()

    def split(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))

    with jax.set_mesh(mesh):
        shapes = jax.tree.map(split, jax.eval_shape(lambda: a_batch(count)))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()


def temporary(loss: Loss, count: int) -> float:
    """MiB of each device beside inputs and outputs."""
    memory = compiled(loss, count).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 2**20


def seconds(loss: Loss, count: int) -> float:
    run, arguments = compiled(loss, count), a_batch(count)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def step_of_jaxembed(args: argparse.Namespace) -> dict[str, float]:
    tree = {
        "model": {"base": args.base, "attention": "causal", "pooling": {"kind": "mean"}, "append_eos": False},
        "data": {"max_length": args.max_length, "sources": [{"path": str(args.data)}]},
        "gradcache": {"rows": args.rows},
        "train": {"steps": 2, "batch_size": args.batch_size, "log_every": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.yaml"
        path.write_text(yaml.safe_dump(tree | {"run": {"dir": f"{folder}/run"}}))
        _, memory = measured(["-m", "jaxembed.train", str(path)])
        rows = read_metrics(Path(folder) / "run")
    return {"batch_size": args.batch_size, "seconds": min(row["step_seconds"] for row in rows), "memory": memory}


def step_of_sentence_transformers(args: argparse.Namespace, batch_size: int) -> dict[str, float]:
    script = str(Path(__file__).parent / "finetune_sentence_transformers.py")
    options = [f"--batch-size={batch_size}", "--steps=1", "--mini-batch-size=64", f"--max-length={args.max_length}"]
    with tempfile.TemporaryDirectory() as folder:
        result, memory = measured([script, args.base, str(args.data), f"{folder}/out", *options])
    return {"batch_size": batch_size, "seconds": result["seconds_per_step"], "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=64, help="gradcache.rows")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--peer-batch-sizes", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--timed", type=int, default=8192)
    args = parser.parse_args()
    memory: dict[str, list[float]] = {}
    print("| loss, value and gradient | " + " | ".join(f"B = {size:,}" for size in SIZES) + " |\n|---|" + "---|" * len(SIZES))
    for name, loss in [("plain InfoNCE", plain), *((name, blockwise(config)) for name, config in VARIANTS.items())]:
        memory[name] = [temporary(loss, size) for size in SIZES]
        print(f"| {name} | " + " | ".join(f"{size:,.0f} MiB" for size in memory[name]) + " |")
    of_mesh = subprocess.run(
        [sys.executable, __file__, "--mesh-part"], env={**os.environ, "XLA_FLAGS": EIGHT}, stdout=subprocess.PIPE, check=True
    )
    for name, values in json.loads(of_mesh.stdout.splitlines()[-1]).items():
        memory[f"{name}, each of 8 devices"] = values
        print(f"| {name}, each of 8 devices | " + " | ".join(f"{size:,.0f} MiB" for size in values) + " |")
    times = {name: seconds(loss, args.timed) for name, loss in (("plain", plain), ("blockwise", blockwise(InfoNCEConfig())))}
    print(f"\n| InfoNCE, B = {args.timed:,} | seconds |\n|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.3f} |")
    print("\n| a step | queries | seconds | peak memory |\n|---|---|---|---|", flush=True)
    steps: list[dict[str, Any]] = []
    runs = [("jaxembed", partial(step_of_jaxembed, args))]
    runs += [("sentence-transformers", partial(step_of_sentence_transformers, args, size)) for size in args.peer_batch_sizes]
    for name, run in runs:
        steps.append({"side": name, **run()})
        told = steps[-1]
        print(f"| {name} | {told['batch_size']:,} | {told['seconds']:.1f} | {told['memory']:.2f} GiB |", flush=True)
    print(json.dumps({"temporary_mib": memory, "seconds": times, "steps": steps}))


if __name__ == "__main__":
    if sys.argv[1:] == ["--mesh-part"]:
        print(
            json.dumps({name: [temporary(blockwise(config, 8), size) for size in SIZES] for name, config in VARIANTS.items()})
        )
    else:
        main()
