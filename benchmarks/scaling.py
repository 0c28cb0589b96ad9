#!/usr/bin/env python3
"""Estimate memory and time of a training step of 32,768 queries on TPU pods, with the TPU compiler and without a TPU.

    python benchmarks/scaling.py MODEL TOPOLOGY [--lora] [--rows N] [--fsdp N] [--remat] [--attention KERNEL] [--negatives K]

MODEL is a preset (qwen2-0.5b, mistral-7b), TOPOLOGY a slice such as v5e:16x16. Compiles the step (bfloat16, layers in a
loop, one text per row of 512 tokens, AdamW) and prints one JSON object: memory per chip, the collectives of the loss and
those of parameters and gradients, and the roofline that docs/results/scaling.md explains. Needs libtpu (the extra `tpu`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from jaxembed.config import LoraConfig
from jaxembed.devices.chips import TPU_CHIPS
from jaxembed.planning.topology import list_topology_devices, skip_tpu_discovery

skip_tpu_discovery()

import jax  # noqa: E402  (must follow skip_tpu_discovery, which sets environment variables that JAX reads)
import jax.numpy as jnp  # noqa: E402

from jaxembed.config import InfoNCEConfig, OptimConfig  # noqa: E402
from jaxembed.config.spec import EmbeddingSpec  # noqa: E402
from jaxembed.data.batch import Batch  # noqa: E402
from jaxembed.data.packing import PackedTexts, compute_max_segments  # noqa: E402
from jaxembed.devices.mesh import count_shards, make_mesh  # noqa: E402
from jaxembed.devices.placement import compute_batch_shapes  # noqa: E402
from jaxembed.losses.objectives import Objectives  # noqa: E402
from jaxembed.model.embedder import EmbeddingModel  # noqa: E402
from jaxembed.model.families import TransformerConfig  # noqa: E402
from jaxembed.model.hf_config import parse_hf_config  # noqa: E402
from jaxembed.model.presets import find_preset  # noqa: E402
from jaxembed.model.transformer import ComputeOptions  # noqa: E402
from jaxembed.planning.flops import count_matmul_flops  # noqa: E402
from jaxembed.planning.program import OutOfMemoryError, Program, compile_loss, compile_step, count_bytes, count_elements  # noqa: E402
from jaxembed.planning.proposal import make_step_sizes, propose  # noqa: E402
from jaxembed.training.optim import make_optimizer, make_schedule  # noqa: E402
from jaxembed.training.state import compute_state_shapes  # noqa: E402
from jaxembed.training.step import make_train_step  # noqa: E402

TOKENS_PER_ROW, SCHEDULE_STEPS = 512, 1000


def build_batch_shapes(args: argparse.Namespace, mesh: Any) -> Batch:
    """Return the shapes of a batch in which each text fills a row."""
    b, k, rows = args.batch_size, args.negatives, args.batch_size * (2 + args.negatives)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    ids = array(rows, TOKENS_PER_ROW)
    segments = args.segments or compute_max_segments(TOKENS_PER_ROW)
    texts = PackedTexts(ids, ids, ids, array(rows, TOKENS_PER_ROW, dtype=bool), segments, count_shards(mesh))
    batch = Batch(
        texts=texts, query_slot=array(b), doc_slot=array(b, 1 + k), in_batch=array(b, dtype=bool),
        query_hash=array(b, 2, dtype=jnp.uint32), doc_hash=array(b, 1 + k, 2, dtype=jnp.uint32),
        positive_hash=array(b, 1, 2, dtype=jnp.uint32), label=array(b), source=array(b),
        teacher_scores=array(b, 1 + k, dtype=jnp.float32), score=array(b, dtype=jnp.float32), is_positive=array(b, dtype=bool),
    )  # fmt: skip
    return compute_batch_shapes(mesh, batch)


def count_useful_flops(transformer: TransformerConfig, lora: bool, tokens: int) -> float:
    """Return the FLOPs of the decoder's matmuls, forward and backward, without recomputation.

    With adapters, the frozen matrices need no gradients, so each of them has two matmuls instead of three.
    """
    width, heads, kv_heads = (
        transformer.width,
        transformer.heads * transformer.head_width,
        transformer.kv_heads * transformer.head_width,
    )
    matrix_elements = width * (2 * heads + 2 * kv_heads + 3 * transformer.mlp_width)
    passes = 2 if lora else 3
    return transformer.layers * tokens * (2 * matrix_elements * passes + 4 * TOKENS_PER_ROW * heads * 3)


def compute_roofline(args: argparse.Namespace, transformer: TransformerConfig, program: Program, chips: int) -> dict[str, Any]:
    """Return the seconds of matmuls, memory traffic and collectives on a chip, each at the chip's published rate."""
    chip = TPU_CHIPS[args.topology.split(":")[0]]
    rows = args.batch_size * (2 + args.negatives)
    useful = count_useful_flops(transformer, args.lora, rows * TOKENS_PER_ROW)
    seconds = {
        "compute": program.flops / chips / chip.peak_flops,
        "memory": estimate_memory_traffic(args, transformer, chips) / chip.memory_bandwidth,
        "collectives": sum(c.count * c.sent_bytes for c in program.collectives.collectives) / chip.link_bandwidth,
    }
    best_seconds = useful / chips / chip.peak_flops
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "step_overlapped": round(max(seconds.values()), 3),
        "step_in_turn": round(sum(seconds.values()), 3),
        "mfu_overlapped": round(best_seconds / max(seconds.values()), 3),
        "mfu_in_turn": round(best_seconds / sum(seconds.values()), 3),
        "useful_of_all_flops": round(useful / program.flops, 3),
    }


def estimate_memory_traffic(args: argparse.Namespace, transformer: TransformerConfig, chips: int) -> float:
    """Estimate the bytes that a chip reads and writes in a step.

    They are the sum of:

    - each matrix once per pass over a chunk of rows, in bfloat16;
    - the inputs and outputs of the matmuls for each token and layer, in bfloat16;
    - the attention scores four times in float32, unless the kernel is splash, which keeps them on the chip;
    - eight float32 values of the optimizer per parameter.
    """
    width, heads, kv_heads = (
        transformer.width,
        transformer.heads * transformer.head_width,
        transformer.kv_heads * transformer.head_width,
    )
    matrix_elements = width * (2 * heads + 2 * kv_heads + 3 * transformer.mlp_width)
    rows = args.batch_size * (2 + args.negatives) // chips
    chunks = -(-rows // (args.rows or rows))
    forward = 1 + (args.rows is not None and not args.keep_chunks) + (args.remat and args.policy != "matmuls")
    passes = forward + (1 if args.lora else 2)
    scores = 0 if args.attention in ("auto", "splash") else 16 * transformer.heads * TOKENS_PER_ROW
    bytes_per_token = 2 * (4 * width + 3 * heads + 2 * kv_heads + 4 * transformer.mlp_width) + scores
    trained = 0 if args.lora else transformer.layers * matrix_elements + transformer.vocab_size * width
    matrix_bytes = chunks * passes * 2 * matrix_elements * transformer.layers
    token_bytes = passes * rows * TOKENS_PER_ROW * transformer.layers * bytes_per_token
    return matrix_bytes + token_bytes + 32 * trained / chips


def build_step(args: argparse.Namespace, mesh: Any) -> tuple[TransformerConfig, Any, Any]:
    """Return the decoder, the jitted step and the shapes of its state."""
    sizes = {"num_hidden_layers": args.layers} if args.layers else {}
    transformer = parse_hf_config({**find_preset(args.model), **sizes}, args.model)
    lora = LoraConfig(rank=16, alpha=32, base_dtype="bfloat16") if args.lora else None
    compute = ComputeOptions(
        dtype=jnp.bfloat16, remat=args.remat, unroll=False, attention_kernel=args.attention, remat_policy=args.policy
    )
    model = EmbeddingModel(transformer, EmbeddingSpec(), compute, lora)
    optim = OptimConfig()
    optimizer = make_optimizer(optim, SCHEDULE_STEPS)
    state = compute_state_shapes(model, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        step = make_train_step(
            model,
            Objectives([InfoNCEConfig()]),
            optimizer,
            make_schedule(optim, SCHEDULE_STEPS),
            chunk_rows=args.rows,
            recompute=not args.keep_chunks,
            shardings=shardings,
        )
    return transformer, step, state


def compile_and_measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compile the step and return its memory, collectives and roofline."""
    devices, memory = list_topology_devices(args.topology)
    mesh = make_mesh(fsdp=args.fsdp or len(devices), devices=devices)
    transformer, step, state = build_step(args, mesh)
    start = time.perf_counter()
    row = {
        **vars(args),
        "chips": len(devices),
        "parameters": count_elements(state.weights),
        "trained": count_elements(state.params),
    }
    row |= {"state_bytes": count_bytes((state.params, state.opt_state, state.frozen)), "device_bytes": memory}
    del row["hlo"]
    if args.propose:
        lora = LoraConfig(base_dtype="bfloat16") if args.lora else None
        tokens = args.batch_size * (2 + args.negatives), TOKENS_PER_ROW
        proposal = propose(make_step_sizes(transformer, row["parameters"], lora, jnp.bfloat16, tokens), mesh, memory)
        return row | {"proposal": proposal and {**dataclasses.asdict(proposal), "settings": proposal.describe()}}
    if args.loss:
        loss = compile_loss(Objectives([InfoNCEConfig()]), {}, transformer.width, build_batch_shapes(args, mesh), mesh)
        return row | {"temporaries": loss.temporaries, "collectives": loss.collectives.to_table()}
    if args.trace:
        with jax.set_mesh(mesh):
            flops = count_matmul_flops(step.trace(state, build_batch_shapes(args, mesh)).jaxpr)
        useful = count_useful_flops(transformer, args.lora, args.batch_size * (2 + args.negatives) * TOKENS_PER_ROW)
        return row | {"flops": flops, "useful_of_all_flops": round(useful / flops, 3)}
    try:
        program, compiled = compile_step(step, state, build_batch_shapes(args, mesh), mesh)
    except OutOfMemoryError as error:
        return row | {"needs_bytes": error.needed, "fits": False, "compile_seconds": round(time.perf_counter() - start)}
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(compiled.as_text())
    return row | {
        "fits": program.memory <= memory,
        "needs_bytes": program.memory,
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "flops": program.flops,
        "collectives": program.collectives.to_table(),
        "unknown_loops": program.collectives.unknown_loops,
        **compute_roofline(args, transformer, program, len(devices)),
        "compile_seconds": round(time.perf_counter() - start),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="preset of the decoder")
    parser.add_argument("topology", metavar="TOPOLOGY", help="TPU slice, such as v5e:16x16")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16 on a bfloat16 base")
    parser.add_argument("--rows", type=int, help="gradcache.rows (default: all rows at once)")
    parser.add_argument("--fsdp", type=int, help="devices that share the parameters (default: all)")
    parser.add_argument("--remat", action="store_true", help="model.remat")
    parser.add_argument("--policy", default="nothing", help="model.remat_policy (default: %(default)s)")
    parser.add_argument("--keep-chunks", action="store_true", help="gradcache.recompute=false")
    parser.add_argument("--layers", type=int, help="layers of the decoder, for memory by layer (default: all)")
    parser.add_argument("--propose", action="store_true", help="print the settings that --plan proposes, without compiling")
    parser.add_argument("--loss", action="store_true", help="compile only the loss and its gradient")
    parser.add_argument("--trace", action="store_true", help="count FLOPs only, without compiling")
    parser.add_argument("--attention", default="auto", help="model.attention_kernel (default: auto, which is splash)")
    parser.add_argument("--batch-size", type=int, default=32_768, help="queries per step (default: %(default)s)")
    parser.add_argument("--negatives", type=int, default=0, help="hard negatives per query (default: %(default)s)")
    parser.add_argument("--segments", type=int, help="maximum number of texts per row (default: one per 8 tokens)")
    parser.add_argument("--hlo", help="file to write the compiled program to")
    print(json.dumps(compile_and_measure(parser.parse_args())))
    sys.stdout.flush()
