"""A step that predicts tokens: the loss of transformers, and the same gradients on any mesh, in chunks, with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import Mesh

from helpers import tiny
from helpers.loading import load_model
from helpers.training_batches import SPEC, assert_trees_close
from jaxembed.config import LoraConfig, MaskedPredictionConfig, SourceConfig
from jaxembed.data.batch import Batch
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.masked_texts import MaskedTextReader
from jaxembed.data.sources import open_source
from jaxembed.data.token_batch import NOT_PREDICTED, TokenBatchBuilder, TokenText
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.mesh import count_shards, make_all_shards, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.losses.objectives import Objectives
from jaxembed.model.lora import join_params, split_params
from jaxembed.training.step import compute_batch_loss

MNTP = MaskedPredictionConfig(mask_rate=0.4, group=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_jsonl(folder / "texts.jsonl", [{"text": f"{text} {i}"} for i in range(4) for text in tiny.TEXTS])
    return folder


def make_builder(folder: Path, shards: int) -> TokenBatchBuilder:
    source = open_source(SourceConfig(path=str(folder / "texts.jsonl")), folder)
    reader = MaskedTextReader(MNTP, TextTokenizer(tiny.build_tokenizer(), SPEC), "objectives.0")
    plan = BatchPlan([source], 16, seed=0)
    return TokenBatchBuilder(plan=plan, read=reader, row_length=32, shards=make_all_shards(shards), seed=0)


def compute(folder: Path, base: Path, mesh: Mesh, lora: bool, chunk_rows: int | None, **keys: Any) -> tuple[Any, Any]:
    """Return loss and gradients of a step on a mesh."""
    model, params = load_model(base, SPEC, mesh, lora=LoraConfig(rank=4, alpha=8.0) if lora else None, **keys)
    trained, frozen = split_params(params)
    if lora:
        trained = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trained)
    with jax.set_mesh(mesh):
        host_batch = make_builder(folder, count_shards(mesh))(0)
        batch = put_batch(mesh, Batch(token_batches={"mntp": host_batch.batch}))

        def loss(trained, frozen, batch):
            return compute_batch_loss(
                model, Objectives([MNTP]), join_params(trained, frozen), batch, jax.random.key(0), chunk_rows
            )[0]

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(trained, frozen, batch))


def torch_loss(base: Path, texts: list[TokenText]) -> torch.Tensor:
    """Return LLM2Vec's loss by transformers: labels at the masked tokens, which its loss shifts by one, 4 texts a mean."""
    config = transformers.AutoConfig.from_pretrained(base)
    config.is_causal = False
    model = transformers.AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="eager")
    losses = []
    for start in range(0, len(texts), 4):
        total, count = torch.zeros(()), 0
        for text in texts[start : start + 4]:
            labels = np.where(np.roll(text.targets, 1) == NOT_PREDICTED, -100, np.roll(text.targets, 1))
            if (predicted := int((labels >= 0).sum())) == 0:
                continue
            inputs, targets = (torch.tensor(x).long()[None] for x in (text.tokens, labels))
            total, count = total + model(input_ids=inputs, labels=targets).loss * predicted, count + predicted
        losses.append(total / count)
    mean = torch.stack(losses).mean()
    mean.backward()
    torch_loss.embedding_grad = model.get_input_embeddings().weight.grad  # type: ignore[attr-defined]
    return mean.detach()


def test_the_loss_and_its_gradient_are_those_of_transformers(base_folder: Callable[[str], Path], folder: Path) -> None:
    """Through the tied embedding, whose gradient has a part of the input and a part of the head."""
    base, builder = base_folder("qwen2"), make_builder(folder, 1)
    loss, grads = compute(folder, base, make_mesh(1), lora=False, chunk_rows=None)
    assert float(loss) == pytest.approx(float(torch_loss(base, builder.read_texts(0, builder.plan[0]))), rel=1e-5)
    expected = torch_loss.embedding_grad.numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(grads["decoder"]["embedding"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("fsdp", "lora"), [(1, True), (2, False)])
def test_eight_devices_in_chunks_equal_one(base_folder: Callable[[str], Path], folder: Path, fsdp: int, lora: bool) -> None:
    base = base_folder("qwen2")
    loss, grads = compute(folder, base, make_mesh(1), lora, None)
    sharded_loss, sharded_grads = compute(folder, base, make_mesh(-1, fsdp), lora, 1)
    assert float(loss) == pytest.approx(float(sharded_loss), rel=1e-5) and loss > 1
    assert_trees_close({"decoder": grads["decoder"]}, {"decoder": sharded_grads["decoder"]})
