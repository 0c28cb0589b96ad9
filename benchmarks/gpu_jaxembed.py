"""Measure jaxembed for benchmarks/gpu.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_workload import LORA_ALPHA, LORA_RANK, MAX_TOKENS, Workload, build_tokenizer, write_words

from jaxembed.config import InfoNCEConfig, LoraConfig, OptimConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import Batch
from jaxembed.data.packing import PackedTexts, compute_max_segments, fill_rows, pack_shards
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.hub.embedder import Embedder
from jaxembed.losses.objectives import Objectives
from jaxembed.model.cudnn import attend_masked, attend_packed, draw_check_inputs, find_fault, measure_error
from jaxembed.model.embedder import EmbeddingModel, init_params
from jaxembed.model.lora import split_params
from jaxembed.model.masks import BIDIRECTIONAL, CAUSAL, Mask, TokenInfo
from jaxembed.model.parameters import compute_shapes_and_shardings
from jaxembed.model.plain_attention import attend_einsum, attend_rows
from jaxembed.model.transformer import ComputeOptions
from jaxembed.training.optim import make_optimizer, make_schedule
from jaxembed.training.step import TrainState, make_train_step

SPEC = EmbeddingSpec(attention="causal", append_eos=False, max_length=MAX_TOKENS)
SCHEDULE_STEPS = 1000
KERNELS: dict[str, Callable[..., jax.Array]] = {"einsum": attend_einsum, "rows": partial(attend_rows, shards=1)}
CUDNN_KERNELS: dict[str, Callable[..., jax.Array]] = {"cudnn, offsets": attend_packed, "cudnn, mask": attend_masked}
# Shapes of attention: rows, tokens, heads, key-value heads, head width.
ATTENTION_SHAPES = {"qwen2-0.5b": (32, 512, 14, 2, 64), "mistral-7b": (16, 512, 32, 8, 128)}
ATTENTION_ROUNDS = 10


def build_model(work: Workload) -> EmbeddingModel:
    """Return the model of a workload, computed in bfloat16."""
    lora = LoraConfig(rank=LORA_RANK, alpha=LORA_ALPHA, base_dtype="bfloat16") if work.lora else None
    compute = ComputeOptions(dtype=jnp.bfloat16, remat=work.recompute, unroll=False)
    return EmbeddingModel(parse_hf_config(work.hf_config, work.preset), SPEC, compute, lora)


def build_batch(texts: list[np.ndarray]) -> Batch:
    """Return a batch of texts, packed into rows. The first half are queries, the second half their documents."""
    lengths = np.array([len(text) for text in texts])
    (packing,), shape = pack_shards([lengths], MAX_TOKENS)
    arrays = fill_rows(texts, np.zeros(len(texts), int), packing.row, packing.segment, shape)
    segments = compute_max_segments(shape[1])
    slots = (packing.row * segments + packing.segment).astype(np.int32)
    b = len(texts) // 2
    hashes = np.arange(4 * b, dtype=np.uint32).reshape(2, b, 2) + 1  # all texts are distinct
    return Batch(
        texts=PackedTexts(**arrays, segments=segments, shards=1), query_slot=slots[:b], doc_slot=slots[b:, None],
        in_batch=np.ones(b, bool), query_hash=hashes[0], doc_hash=hashes[1][:, None], positive_hash=hashes[1][:, None],
        label=np.full(b, -1, np.int32), source=np.zeros(b, np.int32), teacher_scores=np.full((b, 1), np.nan, np.float32),
        score=np.full(b, np.nan, np.float32), is_positive=np.ones(b, bool),
    )  # fmt: skip


def draw_params(model: EmbeddingModel) -> Any:
    """Draw random parameters on the first device."""
    return init_params(model, jax.random.key(0), compute_shapes_and_shardings(model, make_mesh(1))[1])


def measure_training(work: Workload) -> dict[str, Any]:
    """Train on one batch again and again. Return tokens, median seconds, FLOPs and memory of a step."""
    model, mesh, optim, texts = build_model(work), make_mesh(1), OptimConfig(), work.draw_texts()
    optimizer = make_optimizer(optim, SCHEDULE_STEPS)
    trained, frozen = split_params(draw_params(model))
    with jax.set_mesh(mesh):
        state = TrainState(trained, jax.jit(optimizer.init)(trained), jnp.zeros((), jnp.int32), jax.random.key(0), frozen)
        batch = put_batch(mesh, build_batch(texts))
        objectives, schedule = Objectives([InfoNCEConfig()]), make_schedule(optim, SCHEDULE_STEPS)
        step: Any = make_train_step(model, objectives, optimizer, schedule, chunk_rows=work.chunk_rows)
        start = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        seconds = []
        num_warmup_steps = 1 if work.steps > 1 else 0  # a single step takes long enough without one
        for _ in range(num_warmup_steps + work.steps):
            start = time.perf_counter()
            state, metrics = compiled(state, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    assert np.isfinite(loss), f"the loss is {loss}"
    return {
        "tokens": sum(map(len, texts)),
        "computed_tokens": int(batch.texts.tokens.size),
        "seconds": statistics.median(seconds[num_warmup_steps:]),
        "flops": work.count_flops(texts),
        "gib": read_device_peak_gib(),
        "planned_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "compile_seconds": round(compile_seconds, 1),
        "loss": loss,
        "device": jax.devices()[0].device_kind,
    }


def measure_encoding(work: Workload) -> dict[str, Any]:
    """Encode texts as a user does. Return their tokens and the median seconds of a round after the first."""
    model, texts = build_model(work), work.draw_texts()
    tokenizer = TextTokenizer(build_tokenizer(work.hf_config["vocab_size"]), SPEC)
    embedder = Embedder(model, draw_params(model), tokenizer, make_mesh(1), work.hf_config)
    words, seconds = [write_words(text) for text in texts], []
    for _ in range(1 + work.steps):
        start = time.perf_counter()
        embedder.encode(words)
        seconds.append(time.perf_counter() - start)
    return {"tokens": sum(map(len, texts)), "seconds": statistics.median(seconds[1:]), "gib": read_device_peak_gib()}


def read_device_peak_gib() -> float | None:
    """Return the peak of the device's memory in GiB, or None if the device does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def measure_kernels(is_tiny: bool) -> dict[str, Any]:
    """Compare every attention kernel in bfloat16 with einsum in float32, and time it forward and backward."""
    on_gpu = jax.default_backend() == "gpu"
    kernels = KERNELS | (CUDNN_KERNELS if on_gpu else {})
    shapes = {"tiny": (2, 64, 4, 2, 16)} if is_tiny else ATTENTION_SHAPES
    rows = []
    for preset, (count, tokens, heads, kv_heads, width) in shapes.items():
        inputs = draw_check_inputs(width, count, tokens, heads, kv_heads)
        for mask in (CAUSAL, BIDIRECTIONAL):
            for name, kernel in kernels.items():
                row = {"model": preset, "mask": "causal" if mask == CAUSAL else "bidirectional", "kernel": name}
                rows.append(row | measure_kernel(kernel, inputs, mask))
    faults = {name: find_fault(kernel, CAUSAL, 64) for name, kernel in CUDNN_KERNELS.items()} if on_gpu else {}
    return {"kernels": rows, "faults": faults, "device": jax.devices()[0].device_kind, "jax": jax.__version__}


def measure_kernel(kernel: Callable[..., jax.Array], inputs: Any, mask: Mask) -> dict[str, Any]:
    """Return the error of a kernel, and the median milliseconds of its forward and backward pass; or its failure."""
    *qkv, token_info = inputs
    try:
        error = measure_error(kernel, inputs, mask)

        def total(q: jax.Array, k: jax.Array, v: jax.Array, token_info: TokenInfo) -> jax.Array:
            return kernel(q, k, v, token_info, mask, None).astype(jnp.float32).sum()

        run = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        arguments = jax.device_put(([jnp.asarray(x, jnp.bfloat16) for x in qkv], token_info))
        milliseconds = []
        for _ in range(1 + ATTENTION_ROUNDS):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments[0], arguments[1]))
            milliseconds.append(1e3 * (time.perf_counter() - start))
    except Exception as problem:  # one kernel must not hide the others
        return {"error": None, "milliseconds": None, "failed": str(problem).splitlines()[0][:200]}
    return {"error": error, "milliseconds": statistics.median(milliseconds[1:])}
