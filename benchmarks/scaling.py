#!/usr/bin/env python3
"""What a training step of 32,768 queries needs of TPU pods, by the TPU compiler and without a TPU.

    python benchmarks/scaling.py MODEL TOPOLOGY [--lora] [--rows N] [--fsdp N] [--remat] [--attention KERNEL] [--negatives K]

MODEL is a preset (qwen2-0.5b, mistral-7b), TOPOLOGY a slice such as v5e:16x16. Compiles the step (bfloat16, the layer loop
rolled, rows of 512 tokens with a text each, AdamW) and prints one JSON object: memory a chip, collectives of the loss apart
from those of parameters and gradients, and the roofline of docs/results/scaling.md. Needs libtpu (the extra `tpu`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from jaxembed.config import LoraConfig  # noqa: E402
from jaxembed.devices.chips import TPU_CHIPS
from jaxembed.planning.topology import skip_tpu_discovery, topology_devices

skip_tpu_discovery()

import jax  # noqa: E402  (after what it reads from the environment)
import jax.numpy as jnp  # noqa: E402

from jaxembed.config import InfoNCEConfig, OptimConfig  # noqa: E402
from jaxembed.config.spec import EmbeddingSpec  # noqa: E402
from jaxembed.data.batch import Batch  # noqa: E402
from jaxembed.data.packing import PackedTexts, max_segments  # noqa: E402
from jaxembed.devices.mesh import make_mesh, shard_count  # noqa: E402
from jaxembed.devices.placement import batch_shapes  # noqa: E402
from jaxembed.losses.objectives import Objectives  # noqa: E402
from jaxembed.model.decoder import ComputeOptions  # noqa: E402
from jaxembed.model.embedder import EmbeddingModel  # noqa: E402
from jaxembed.model.families import DecoderConfig, parse_hf_config, find_preset  # noqa: E402
from jaxembed.planning.program import NoRoom, Program, compile_step, numbers, size  # noqa: E402
from jaxembed.runs.stages import state_shapes  # noqa: E402
from jaxembed.training.optim import learning_rate, make_optimizer  # noqa: E402
from jaxembed.training.step import make_train_step  # noqa: E402

TOKENS, STEPS = 512, 1000


def full_batch_shapes(args: argparse.Namespace, mesh: Any) -> Batch:
    """A batch whose texts fill a row each."""
    b, k, rows = args.batch_size, args.negatives, args.batch_size * (2 + args.negatives)

    def of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    ids = of(rows, TOKENS)
    segments = args.segments or max_segments(TOKENS)
    texts = PackedTexts(ids, ids, ids, of(rows, TOKENS, dtype=bool), segments, shard_count(mesh))
    batch = Batch(
        texts=texts, query_slot=of(b), doc_slot=of(b, 1 + k), in_batch=of(b, dtype=bool),
        query_hash=of(b, 2, dtype=jnp.uint32), doc_hash=of(b, 1 + k, 2, dtype=jnp.uint32),
        positive_hash=of(b, 1, 2, dtype=jnp.uint32), label=of(b), source=of(b),
        teacher_scores=of(b, 1 + k, dtype=jnp.float32),
    )  # fmt: skip
    return batch_shapes(mesh, batch)


def model_flops(decoder: DecoderConfig, lora: bool, tokens: int) -> float:
    """The useful operations of a step: products of the decoder forward and backward, none computed twice.

    With adapters the frozen matrices have no gradient of their own.
    """
    width, heads, kv_heads = decoder.width, decoder.heads * decoder.head_width, decoder.kv_heads * decoder.head_width
    matrices = width * (2 * heads + 2 * kv_heads + 3 * decoder.mlp_width)
    passes = 2 if lora else 3
    return decoder.layers * tokens * (2 * matrices * passes + 4 * TOKENS * heads * 3)


def roofline(args: argparse.Namespace, decoder: DecoderConfig, program: Program, chips: int) -> dict[str, Any]:
    """Seconds of a step's products, memory traffic and collectives on a chip, each at its published rate."""
    chip = TPU_CHIPS[args.topology.split(":")[0]]
    rows = args.batch_size * (2 + args.negatives)
    useful = model_flops(decoder, args.lora, rows * TOKENS)
    seconds = {
        "compute": program.flops / chips / chip.peak_flops,
        "memory": memory_traffic(args, decoder, chips) / chip.memory_bandwidth,
        "collectives": sum(c.count * c.sent_bytes for c in program.collectives.found) / chip.link_bandwidth,
    }
    at_best = useful / chips / chip.peak_flops
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "step_overlapped": round(max(seconds.values()), 3),
        "step_in_turn": round(sum(seconds.values()), 3),
        "mfu_overlapped": round(at_best / max(seconds.values()), 3),
        "mfu_in_turn": round(at_best / sum(seconds.values()), 3),
        "useful_of_all_flops": round(useful / program.flops, 3),
    }


def memory_traffic(args: argparse.Namespace, decoder: DecoderConfig, chips: int) -> float:
    """Bytes that a chip reads and writes, reckoned: in each pass over a chunk of rows every matrix once, in bfloat16, and
    for every token and layer what products read and write (also bfloat16), scores in float32 four times over unless the
    kernel is splash, which keeps them on the chip; the optimizer's eight float32 numbers a parameter.
    """
    width, heads, kv_heads = decoder.width, decoder.heads * decoder.head_width, decoder.kv_heads * decoder.head_width
    matrices = width * (2 * heads + 2 * kv_heads + 3 * decoder.mlp_width)
    rows = args.batch_size * (2 + args.negatives) // chips
    chunks = -(-rows // (args.rows or rows))
    forward = 1 + (args.rows is not None) + args.remat
    passes = forward + (1 if args.lora else 2)
    scores = 0 if args.attention in ("auto", "splash") else 16 * decoder.heads * TOKENS
    a_token = 2 * (4 * width + 3 * heads + 2 * kv_heads + 4 * decoder.mlp_width) + scores
    trained = 0 if args.lora else decoder.layers * matrices + decoder.vocab_size * width
    moved = chunks * passes * 2 * matrices * decoder.layers + passes * rows * TOKENS * decoder.layers * a_token
    return moved + 32 * trained / chips


def step_of(args: argparse.Namespace, mesh: Any) -> tuple[DecoderConfig, Any, Any]:
    """The decoder, the jitted step and the shapes of its state."""
    decoder = parse_hf_config(find_preset(args.model), args.model)
    lora = LoraConfig(rank=16, alpha=32, base_dtype="bfloat16") if args.lora else None
    compute = ComputeOptions(jnp.bfloat16, args.remat, False, args.attention)
    model = EmbeddingModel(decoder, EmbeddingSpec(), compute, lora)
    optim = OptimConfig()
    optimizer = make_optimizer(optim, STEPS)
    state = state_shapes(optimizer, model, mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        step = make_train_step(
            model, Objectives([InfoNCEConfig()]), optimizer, learning_rate(optim, STEPS), rows=args.rows, shardings=placed
        )
    return decoder, step, state


def measure(args: argparse.Namespace) -> dict[str, Any]:
    devices, memory = topology_devices(args.topology)
    mesh = make_mesh(fsdp=args.fsdp or len(devices), devices=devices)
    decoder, step, state = step_of(args, mesh)
    began = time.perf_counter()
    row = {**vars(args), "chips": len(devices), "parameters": numbers(state.weights), "trained": numbers(state.params)}
    row |= {"state_bytes": size((state.params, state.opt_state, state.frozen)), "device_bytes": memory}
    del row["hlo"]
    try:
        program, compiled = compile_step(step, state, full_batch_shapes(args, mesh), mesh)
    except NoRoom as error:
        return row | {"needs_bytes": error.needed, "fits": False, "compile_seconds": round(time.perf_counter() - began)}
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(compiled.as_text())
    return row | {
        "fits": program.memory <= memory,
        "needs_bytes": program.memory,
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "flops": program.flops,
        "collectives": program.collectives.table(),
        "unknown_loops": program.collectives.unknown_loops,
        **roofline(args, decoder, program, len(devices)),
        "compile_seconds": round(time.perf_counter() - began),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("topology")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16 on a base in bfloat16; else everything trains")
    parser.add_argument("--rows", type=int, help="gradcache.rows; none: all rows at once")
    parser.add_argument("--fsdp", type=int, help="devices that share the parameters (all)")
    parser.add_argument("--remat", action="store_true", help="model.remat")
    parser.add_argument("--attention", default="auto", help="model.attention_kernel (auto: splash)")
    parser.add_argument("--batch-size", type=int, default=32_768)
    parser.add_argument("--negatives", type=int, default=0, help="hard negatives a query (0)")
    parser.add_argument("--segments", type=int, help="texts a row holds at most (one per 8 tokens)")
    parser.add_argument("--hlo", help="file for the compiled program's text")
    print(json.dumps(measure(parser.parse_args())))
    sys.stdout.flush()
