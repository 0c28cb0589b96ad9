"""A step that predicts tokens: the loss of transformers, and the same gradients on any mesh, in chunks, with adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from helpers.training_batches import SPEC, assert_sums_are_float32, assert_trees_close, build_host_batches, open_letter_pairs
from jaxembed.config import (
    CausalLMConfig,
    InfoNCEConfig,
    LoraConfig,
    MaskedPredictionConfig,
    ObjectiveConfig,
    SourceConfig,
    TokenObjectiveConfig,
)
from jaxembed.data.batch import Batch
from jaxembed.data.batch_plan import BatchPlan
from jaxembed.data.chat_texts import ChatReader
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.masked_texts import MaskedTextReader
from jaxembed.data.sources import open_source
from jaxembed.data.token_batch import NOT_PREDICTED, ReadTokenTexts, TokenBatchBuilder, TokenText
from jaxembed.data.tokenize import TextTokenizer
from jaxembed.devices.mesh import count_shards, make_all_shards, make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.formats.weights import to_tensors
from jaxembed.losses.objectives import Objectives
from jaxembed.model.lora import join_params, merge_adapters, split_params
from jaxembed.training.step import compute_batch_loss

MNTP = MaskedPredictionConfig(mask_rate=0.4, group=4)
DIFFUSION = MaskedPredictionConfig(
    mask_rate=0.1, max_mask_rate=1.0, mask_rule="all", token_weight="inverse_rate", predict_from="same", group=4
)
CAUSAL_LM = CausalLMConfig(group=4)
PREFIX_LM = CausalLMConfig(group=4, attention="prefix_lm")
BY_TEXTS = CausalLMConfig(group=4, average="texts")
KL = CausalLMConfig(group=4, kl_to_base=10.0)
OBJECTIVES = {
    "mntp": MNTP,
    "diffusion": DIFFUSION,
    "causal_lm": CAUSAL_LM,
    "prefix_lm": PREFIX_LM,
    "by_texts": BY_TEXTS,
    "kl": KL,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write texts, conversations, and a base with a head of its own."""
    folder = tmp_path_factory.mktemp("texts")
    texts = [f"{text} {i}" for i in range(4) for text in tiny.TEXTS]
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    roles = ("user", "assistant", "user", "assistant")
    chats = [[{"role": role, "content": text[j : j + 5 + j]} for j, role in enumerate(roles)] for text in texts]
    write_jsonl(folder / "chats.jsonl", [{"messages": messages} for messages in chats])
    tiny.write_folder(folder / "with_head", "mistral", head=True)
    return folder


def find_base(name: str, base_folder: Callable[[str], Path], folder: Path) -> Path:
    return folder / name if name == "with_head" else base_folder(name)


def make_builder(folder: Path, shards: int, config: TokenObjectiveConfig) -> TokenBatchBuilder:
    is_mntp, tokenizer = isinstance(config, MaskedPredictionConfig), tiny.build_tokenizer()
    source = open_source(SourceConfig(path=str(folder / ("texts.jsonl" if is_mntp else "chats.jsonl"))), folder)
    reader: ReadTokenTexts
    if isinstance(config, MaskedPredictionConfig):
        reader = MaskedTextReader(config, TextTokenizer(tokenizer, SPEC), "objectives.0")
    else:
        reader = ChatReader(config, TextTokenizer(tokenizer, SPEC.replace(max_length=96)), "objectives.0")  # type: ignore[arg-type]
    plan = BatchPlan([source], 16, seed=0)
    return TokenBatchBuilder(plan=plan, read=reader, row_length=96, shards=make_all_shards(shards), seed=0)


def compute(
    folder: Path, base: Path, mesh: Mesh, config: TokenObjectiveConfig, lora: bool = False, chunk_rows: int | None = None,
    others: Sequence[ObjectiveConfig] = (), queries: Callable[[int], Batch] = lambda shards: Batch(),
) -> tuple[Any, Any]:  # fmt: skip
    """Return loss and gradients of a step on a mesh, by default of one objective alone."""
    lora_config = LoraConfig(rank=4, alpha=8.0) if lora else None
    model, params = load_model(base, SPEC, mesh, lora_config, has_head=base.name == "with_head", unroll=False)
    trained, frozen = split_params(params)
    if lora:
        trained = perturb(trained)
    objectives = Objectives([*others, config])
    (label,) = objectives.token_configs
    with jax.set_mesh(mesh):
        shards = count_shards(mesh)
        token_batch = make_builder(folder, shards, config)(0).batch
        batch = put_batch(mesh, dataclasses.replace(queries(shards), token_batches={label: token_batch}))

        def loss(trained, frozen, batch):
            return compute_batch_loss(model, objectives, join_params(trained, frozen), batch, jax.random.key(0), chunk_rows)[0]

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(trained, frozen, batch))


def perturb(trained: Any) -> Any:
    """Return adapters whose second factor is not zero."""
    return jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trained)


def torch_token_loss(model: Any, texts: list[TokenText], config: TokenObjectiveConfig) -> torch.Tensor:
    """Return the loss of transformers, with labels at the predicted tokens, which it shifts by one; 4 texts a mean.

    The sum over 4 texts is divided by their predicted tokens, or by 4 as GritLM's `NextTokenLoss` of the type "token" does.
    """
    losses = []
    for start in range(0, len(texts), 4):
        group = texts[start : start + 4]
        total, count = torch.zeros(()), 0
        for text in group:
            labels = np.where(np.roll(text.targets, 1) == NOT_PREDICTED, -100, np.roll(text.targets, 1))
            if (predicted := int((labels >= 0).sum())) == 0:
                continue
            inputs, targets = (torch.tensor(x).long()[None] for x in (text.tokens, labels))
            mask = {"attention_mask": build_prefix_mask(text)} if config is PREFIX_LM else {}
            total, count = total + model(input_ids=inputs, labels=targets, **mask).loss * predicted, count + predicted
        losses.append(total / (len(group) if config is BY_TEXTS else count))
    return torch.stack(losses).mean()


def torch_diffusion_loss(model: Any, texts: list[TokenText]) -> torch.Tensor:
    """Return LLaDA's loss of masked tokens, as its guidelines have it: divided by the rate of the text, and by all tokens."""
    losses = []
    for start in range(0, len(texts), 4):
        total = torch.zeros(())
        for text in texts[start : start + 4]:
            input_ids, targets = (torch.tensor(x).long() for x in (text.tokens, text.targets))
            masked_indices, p_mask = targets != NOT_PREDICTED, 1 / text.weight
            logits = model(input_ids=input_ids[None]).logits[0]
            total = total + torch.sum(
                torch.nn.functional.cross_entropy(logits[masked_indices], targets[masked_indices], reduction="none") / p_mask
            )
        losses.append(total / sum(len(text.tokens) for text in texts[start : start + 4]))
    return torch.stack(losses).mean()


def build_prefix_mask(text: TokenText) -> torch.Tensor:
    """Return the additive mask [1, 1, T, T] of a text whose context is bidirectional."""
    length = len(text.tokens)
    seen = torch.tril(torch.ones(length, length))
    seen[: text.context, : text.context] = 1
    return torch.where(seen > 0, 0.0, torch.finfo(torch.float32).min)[None, None]


def load_torch_model(base: Path, is_causal: bool) -> Any:
    config = transformers.AutoConfig.from_pretrained(base)
    config.is_causal = is_causal
    return transformers.AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="eager")


def assert_gradients_close(grads: Any, model: Any) -> None:
    """Compare the gradients of both tables of tokens, and of a layer."""
    expected = {
        "embedding": (grads["decoder"]["embedding"], model.get_input_embeddings().weight.grad),
        "layer": (grads["decoder"]["layers"]["mlp"]["down"]["kernel"][0].T, model.model.layers[0].mlp.down_proj.weight.grad),
    }
    if "head" in grads:
        expected["head"] = (grads["head"]["embedding"], model.lm_head.weight.grad)
    for name, (grad, torch_grad) in expected.items():
        np.testing.assert_allclose(grad, torch_grad.numpy(), rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "base_name"),
    [
        *((name, base) for name in ("mntp", "causal_lm", "prefix_lm") for base in ("qwen2", "with_head")),
        ("by_texts", "qwen2"), ("diffusion", "qwen2"),
    ],
)  # fmt: skip
def test_the_loss_and_its_gradient_are_those_of_transformers(
    base_folder: Callable[[str], Path], folder: Path, name: str, base_name: str
) -> None:
    """Through the tied embedding, whose gradient has a part of the input and a part of the head, or a separate head."""
    base, config = find_base(base_name, base_folder, folder), OBJECTIVES[name]
    loss, grads = compute(folder, base, make_mesh(1), config)
    model = load_torch_model(base, is_causal=isinstance(config, CausalLMConfig))
    builder = make_builder(folder, 1, config)
    texts = builder.read_texts(0, builder.plan[0])
    expected = torch_diffusion_loss(model, texts) if config is DIFFUSION else torch_token_loss(model, texts, config)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ("head" in grads) == (base_name == "with_head")
    assert_gradients_close(grads, model)


def build_queries(folder: Path, shards: int) -> Batch:
    return build_host_batches(open_letter_pairs(folder), shards, 1, row_length=32)[0].batch


def torch_contrastive_loss(model: Any, batch: Batch, temperature: float) -> torch.Tensor:
    """Return GritLM's loss of vectors: mean pooling, and the documents of all queries as candidates."""
    assert batch.texts is not None

    def embed(slot: int) -> torch.Tensor:
        row, segment = divmod(int(slot), batch.texts.segments)  # type: ignore[union-attr]
        ids = batch.texts.tokens[row][batch.texts.segment_ids[row] == segment + 1]  # type: ignore[union-attr]
        hidden = model.model(input_ids=torch.tensor(np.array(ids)).long()[None]).last_hidden_state
        return torch.nn.functional.normalize(hidden[0].mean(0), dim=0)

    queries = torch.stack([embed(slot) for slot in batch.query_slot])
    documents = torch.stack([embed(slot) for slot in batch.doc_slot.ravel()])
    targets = torch.arange(len(queries)) * batch.doc_slot.shape[1]
    return torch.nn.functional.cross_entropy(queries @ documents.T / temperature, targets)


def test_grit_is_the_sum_of_both_losses_over_the_same_weights(folder: Path) -> None:
    """Vectors under the bidirectional mask and answers under the causal one, in value and gradient."""
    base, others = folder / "with_head", [InfoNCEConfig(temperature=0.1)]
    config = CAUSAL_LM.model_copy(update={"weight": 0.5})
    loss, grads = compute(
        folder, base, make_mesh(1), config, others=others, queries=lambda shards: build_queries(folder, shards)
    )
    model, builder = load_torch_model(base, is_causal=True), make_builder(folder, 1, config)
    expected = 0.5 * torch_token_loss(model, builder.read_texts(0, builder.plan[0]), config)
    model.config.is_causal = False
    expected = expected + torch_contrastive_loss(model, build_queries(folder, 1), 0.1)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_gradients_close(grads, model)


@pytest.mark.parametrize(
    ("name", "base_name", "fsdp", "lora"),
    [
        ("mntp", "qwen2", 1, True),
        ("diffusion", "qwen2", 2, False),
        ("causal_lm", "with_head", 2, False),
        ("kl", "qwen2", 1, True),
    ],
)
def test_eight_devices_in_chunks_equal_one(
    base_folder: Callable[[str], Path], folder: Path, name: str, base_name: str, fsdp: int, lora: bool
) -> None:
    """The generative objective beside the contrastive one, as in GRIT."""
    base, config = find_base(base_name, base_folder, folder), OBJECTIVES[name]
    is_grit = name == "causal_lm"
    keys: Any = {"others": [InfoNCEConfig()], "queries": lambda shards: build_queries(folder, shards)} if is_grit else {}
    loss, grads = compute(folder, base, make_mesh(1), config, lora, **keys)
    sharded_loss, sharded_grads = compute(folder, base, make_mesh(-1, fsdp), config, lora, chunk_rows=1, **keys)
    assert float(loss) == pytest.approx(float(sharded_loss), rel=1e-5) and loss > 1
    parts = grads.keys() & {"decoder", "head"}
    assert_trees_close({part: grads[part] for part in parts}, {part: sharded_grads[part] for part in parts})


def test_sums_are_float32_under_bfloat16(folder: Path) -> None:
    """Of the losses, and of the divergence from the base."""
    lora = LoraConfig(rank=4, alpha=8.0)
    model, params = load_model(folder / "with_head", SPEC, lora=lora, has_head=True, dtype=jnp.bfloat16)
    objectives, batch = Objectives([KL]), Batch(token_batches={"causal_lm": make_builder(folder, 1, KL)(0).batch})
    loss = jax.jit(lambda params, batch: compute_batch_loss(model, objectives, params, batch, jax.random.key(0)))
    assert_sums_are_float32(loss.trace(params, batch))


def test_the_kl_divergence_is_to_the_base_without_adapters(base_folder: Callable[[str], Path], folder: Path) -> None:
    """Computed by transformers: the base, and the base with merged adapters."""
    base = base_folder("qwen2")
    losses = [float(compute(folder, base, make_mesh(1), config, lora=True)[0]) for config in (CAUSAL_LM, KL)]
    _, params = load_model(base, SPEC, lora=LoraConfig(rank=4, alpha=8.0))
    trained, frozen = split_params(params)
    merged = merge_adapters(join_params(perturb(trained), frozen), LoraConfig(rank=4, alpha=8.0))
    torch_models = [load_torch_model(base, is_causal=True) for _ in range(2)]
    tensors = {name: torch.tensor(np.array(x[:])) for name, x in to_tensors(merged, "qwen2").items()}  # type: ignore[index]
    torch_models[1].model.load_state_dict(tensors)
    builder, means = make_builder(folder, 1, KL), []
    texts = builder.read_texts(0, builder.plan[0])
    for start in range(0, len(texts), 4):
        divergences = []
        for text in texts[start : start + 4]:
            ids = torch.tensor(text.tokens).long()[None]
            predicted = torch.tensor(text.targets != NOT_PREDICTED)
            logs = [torch.log_softmax(torch_model(input_ids=ids).logits[0][predicted], dim=-1) for torch_model in torch_models]
            divergences.append(torch.sum(logs[0].exp() * (logs[0] - logs[1]), dim=-1))
        means.append(torch.cat(divergences).mean())
    expected = float(torch.stack(means).mean().detach())
    assert expected > 1e-4
    assert losses[1] - losses[0] == pytest.approx(KL.kl_to_base * expected, rel=1e-3)
