"""Batches for training steps: a source of letter pairs, tokenized and packed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helpers import tiny
from jaxembed.config import SourceConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import BatchBuilder, HostBatch
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.batch_sampler import BatchSampler
from jaxembed.data.packing import PackedTexts
from jaxembed.data.sources import Source, open_source
from jaxembed.data.tokenize import TextTokenizer, append_eos
from jaxembed.devices.mesh import make_all_shards

SPEC = EmbeddingSpec(attention="bidirectional", pooling="mean", max_length=16)
BATCH_SIZE = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def open_letter_pairs(folder: Path) -> Source:
    """Write and open pairs whose query and positive share their letters, with two hard negatives each."""
    random = np.random.default_rng(0)

    def text(letters: np.ndarray) -> str:
        return " ".join(random.permutation(letters)[: random.integers(3, 7)])

    rows = []
    for _ in range(64):
        own, other = random.permutation(list(LETTERS))[:12].reshape(2, 6)
        rows.append({"query": text(own), "pos": [text(own)], "neg": [text(other), text(other)]})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceConfig(path=str(path)), path.parent)


def build_host_batches(source: Source, shards: int, steps: int, row_length: int = 128) -> list[HostBatch]:
    """Build the batches of the first steps of a run on one source."""
    tokenizer = tiny.build_tokenizer()
    append_eos(tokenizer)
    sampler = BatchSampler(sources=[source], tokenizer=TextTokenizer(tokenizer, SPEC), hard_negatives=2, seed=0)
    build = BatchBuilder(sampler=sampler, row_length=row_length, shards=make_all_shards(shards))
    plan = BatchPlan([source], BATCH_SIZE, seed=0)
    return [build(step, plan[step]) for step in range(steps)]


def list_all_slots(texts: PackedTexts) -> jax.Array:
    """Return the slots of a batch [slots, 1], including slots without a text."""
    shard_slots = jnp.arange(len(texts.tokens) // texts.shards * texts.segments, dtype=jnp.int32)
    return jnp.tile(shard_slots, texts.shards)[:, None]


def assert_sums_are_float32(traced: jax.stages.Traced) -> None:
    """Check that a program computes matmuls in bfloat16, but sums, exponentials and outputs in float32."""
    operations = {(name, dtype) for dtype, name in re.findall(r":(\w+)\[[^\]]*\] = (\w+)", str(traced.jaxpr))}
    assert ("dot_general", "bf16") in operations  # the matmuls of the layers
    assert {("reduce_sum", "f32"), ("rsqrt", "f32"), ("exp", "f32"), ("reduce_max", "f32"), ("log", "f32")} <= operations
    bfloat16 = {name for name, dtype in operations if dtype == "bf16"}
    assert not {name for name in bfloat16 if name.startswith(("reduce", "cum", "scatter"))}
    assert not bfloat16 & {"exp", "log", "rsqrt", "div", "sqrt"}
    assert not [leaf for leaf in jax.tree.leaves(traced.out_info) if leaf.dtype == jnp.bfloat16]


def assert_trees_close(a: Any, b: Any) -> None:
    """Check that the leaves of `a` are not zero, and that those of `b` differ by at most 1e-5 of their norm."""
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x) > 1e-7, path
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x), path
