#!/usr/bin/env python3
"""Estimate memory and time of a training step of 32,768 queries on TPU pods, with the TPU compiler and without a TPU.

    python benchmarks/scaling.py MODEL TOPOLOGY [--lora] [--rows N] [--fsdp N] [--remat] [--attention KERNEL] [--negatives K]

MODEL is a preset (qwen2-0.5b, mistral-7b), TOPOLOGY a slice such as v5e:16x16. Compiles the step (bfloat16, layers in a
loop, one text per row of 512 tokens, AdamW) and prints one JSON object: memory per chip, the collectives of the loss and
those of parameters and gradients, and the roofline that docs/results/scaling.md explains. Compilation stops once memory is
assigned, unless --code or --hlo is given. Needs libtpu (the extra `tpu`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxembed.config import LoraConfig
from jaxembed.devices.chips import TPU_CHIPS
from jaxembed.planning.assignment import run_in_child, write_assignments
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
from jaxembed.formats.hf_config import parse_hf_config  # noqa: E402
from jaxembed.losses.objectives import Objectives  # noqa: E402
from jaxembed.model.embedder import EmbeddingModel  # noqa: E402
from jaxembed.model.families import TransformerConfig  # noqa: E402
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
    b, k, rows = args.batch_size, args.negatives, count_rows(args)

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
    query_width, _ = compute_attention_widths(transformer)
    passes = 2 if lora else 3
    flops_per_token = 2 * count_layer_weights(transformer) * passes + 4 * TOKENS_PER_ROW * query_width * 3
    return transformer.layers * tokens * flops_per_token


def compute_attention_widths(transformer: TransformerConfig) -> tuple[int, int]:
    """Return the widths of the queries, and of the keys and values, of all heads together."""
    return transformer.heads * transformer.head_width, transformer.kv_heads * transformer.head_width


def count_layer_weights(transformer: TransformerConfig) -> int:
    """Return the number of elements of a layer's matrices: four of attention, and three of the gated MLP."""
    query_width, key_width = compute_attention_widths(transformer)
    return transformer.width * (2 * query_width + 2 * key_width + 3 * transformer.mlp_width)


def count_rows(args: argparse.Namespace) -> int:
    """Return the rows of a batch: one for each query, positive and negative."""
    return int(args.batch_size * (2 + args.negatives))


def compute_roofline(args: argparse.Namespace, transformer: TransformerConfig, program: Program, chips: int) -> dict[str, Any]:
    """Return the roofline of a step.

    Returns:
        The seconds of matmuls, memory traffic and collectives on a chip, each at the chip's published rate; the seconds and
        the MFU of a step if the three overlap, and if they follow each other; and the share of the FLOPs that are useful.
    """
    chip = TPU_CHIPS[args.topology.split(":")[0]]
    useful = count_useful_flops(transformer, args.lora, count_rows(args) * TOKENS_PER_ROW)
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
    query_width, key_width = compute_attention_widths(transformer)
    layer_weights = count_layer_weights(transformer)
    rows = count_rows(args) // chips
    chunks = -(-rows // (args.rows or rows))
    recomputes_chunks = args.rows is not None and not args.keep_chunks
    recomputes_layers = args.remat and args.policy not in ("matmuls", "offload")
    passes = 1 + recomputes_chunks + recomputes_layers + (1 if args.lora else 2)
    score_bytes = 0 if args.attention in ("auto", "splash") else 16 * transformer.heads * TOKENS_PER_ROW
    bytes_per_token = 2 * (4 * transformer.width + 3 * query_width + 2 * key_width + 4 * transformer.mlp_width) + score_bytes
    trained = 0 if args.lora else transformer.layers * layer_weights + transformer.vocab_size * transformer.width
    matrix_bytes = chunks * passes * 2 * layer_weights * transformer.layers
    token_bytes = passes * rows * TOKENS_PER_ROW * transformer.layers * bytes_per_token
    return matrix_bytes + token_bytes + 32 * trained / chips


def estimate_host_bytes(args: argparse.Namespace, transformer: TransformerConfig, chips: int) -> int:
    """Return the bytes that a chip writes to its host and reads back in a step: the bfloat16 values that are offloaded."""
    if args.policy != "offload":
        return 0
    query_width, key_width = compute_attention_widths(transformer)
    values = 2 * transformer.width + 2 * query_width + 2 * key_width + 2 * transformer.mlp_width
    return 2 * 2 * values * transformer.layers * TOKENS_PER_ROW * count_rows(args) // chips


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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options, the sizes of the step, and what the options ask for: by default, all that compiling shows."""
    devices, memory = list_topology_devices(args.topology)
    mesh = make_mesh(fsdp=args.fsdp or len(devices), devices=devices)
    transformer, step, state = build_step(args, mesh)
    sizes = {
        **{name: value for name, value in vars(args).items() if name not in ("hlo", "code", "assignments")},
        "chips": len(devices),
        "parameters": count_elements(state.weights),
        "trained": count_elements(state.params),
        "state_bytes": count_bytes((state.params, state.opt_state, state.frozen)),
        "device_bytes": memory,
    }
    if args.propose:
        return sizes | propose_settings(args, transformer, sizes["parameters"], mesh, memory)
    if args.loss:
        batch = build_batch_shapes(args, mesh)
        loss = compile_loss(Objectives([InfoNCEConfig()]), {}, transformer.width, batch, mesh, args.assignments)
        return sizes | {"temporaries": loss.temporaries, "collectives": loss.collectives.to_table()}
    if args.trace:
        with jax.set_mesh(mesh):
            flops = count_matmul_flops(step.trace(state, build_batch_shapes(args, mesh)).jaxpr)
        useful = count_useful_flops(transformer, args.lora, count_rows(args) * TOKENS_PER_ROW)
        return sizes | {"flops": flops, "useful_of_all_flops": round(useful / flops, 3)}
    return sizes | compile_and_measure(args, transformer, step, state, mesh, memory)


def propose_settings(
    args: argparse.Namespace, transformer: TransformerConfig, parameters: int, mesh: Any, memory: int
) -> dict[str, Any]:
    """Return the settings that `train --plan` proposes; None if none fit into `memory` bytes of a chip."""
    lora = LoraConfig(base_dtype="bfloat16") if args.lora else None
    sizes = make_step_sizes(transformer, parameters, lora, jnp.bfloat16, (count_rows(args), TOKENS_PER_ROW))
    proposal = propose(sizes, mesh, memory)
    return {"proposal": proposal and {**dataclasses.asdict(proposal), "settings": proposal.describe()}}


def compile_and_measure(
    args: argparse.Namespace, transformer: TransformerConfig, step: Any, state: Any, mesh: Any, memory: int
) -> dict[str, Any]:
    """Compile the step. Return bytes, FLOPs, collectives and roofline, and whether it fits into `memory` bytes of a chip."""
    start = time.perf_counter()
    try:
        program, compiled = compile_step(step, state, build_batch_shapes(args, mesh), mesh, args.assignments)
    except OutOfMemoryError as error:
        return {"needs_bytes": error.needed, "fits": False, "compile_seconds": round(time.perf_counter() - start)}
    compile_seconds = round(time.perf_counter() - start)
    if args.hlo:
        args.hlo.write_text(compiled.as_text())
    return {
        "fits": program.memory <= memory,
        "needs_bytes": program.memory,
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "flops": program.flops,
        "collectives": program.collectives.to_table(),
        "unknown_loops": program.collectives.unknown_loops,
        **compute_roofline(args, transformer, program, mesh.devices.size),
        "host_bytes": estimate_host_bytes(args, transformer, mesh.devices.size),
        "compile_seconds": compile_seconds,
    }


def main() -> None:
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
    parser.add_argument("--hlo", type=Path, help="file to write the compiled program to")
    parser.add_argument("--code", action="store_true", help="compile whole, with machine code")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.assignments = None if args.code or args.hlo else Path(folder)
        if args.assignments:
            write_assignments(args.assignments)
        # The compiler is left behind in the child's threads.
        print(json.dumps(run_in_child(lambda: measure(args))))


if __name__ == "__main__":
    main()
