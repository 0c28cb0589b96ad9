"""Objectives agree with the losses of sentence-transformers, in value and gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs

from helpers.text_batches import ALL_DIRECTIONS, draw_unit_vectors, make_batch, make_encoded
from jaxembed.config import (
    DistillationConfig,
    EmbeddingMatchingConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    ObjectiveConfig,
    SpreadOutConfig,
)
from jaxembed.data.batch import Batch, FrozenVectors
from jaxembed.losses.objectives import VECTOR_OBJECTIVES, Objectives
from jaxembed.model.layers import l2_normalize


def compute_ours(
    config: ObjectiveConfig, q: np.ndarray, d: np.ndarray, batch: Batch | None = None, params: Any = None
) -> tuple[float, np.ndarray]:
    """Return the loss and its gradient by the queries."""
    names = [f"q{i}" for i in range(len(q))]
    batch = batch or make_batch(names, [[f"{name} {k}" for k in range(d.shape[1])] for name in names])

    def loss(q: jax.Array) -> jax.Array:
        return VECTOR_OBJECTIVES[config.name](
            config, make_encoded(l2_normalize(q), jax.device_put(d), batch, params=params or {})
        )[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(jax.device_put(q))
    return float(value), np.asarray(gradient)


def compute_torch(loss: Any, q: np.ndarray, d: np.ndarray, *labels: Any) -> tuple[float, np.ndarray]:
    """Return a sentence-transformers loss and its gradient by the queries."""
    leaf = torch.tensor(q, requires_grad=True)
    columns = [torch.nn.functional.normalize(leaf), *(torch.tensor(d[:, k]) for k in range(d.shape[1]))]
    value = loss.compute_loss_from_embeddings(columns, *(labels or [None]))
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    return float(value.detach()), leaf.grad.numpy()


def assert_agree(ours: tuple[float, np.ndarray], reference: tuple[float, np.ndarray]) -> None:
    assert ours[0] == pytest.approx(reference[0], rel=1e-5)
    assert np.linalg.norm(ours[1] - reference[1]) <= 2e-5 * np.linalg.norm(reference[1])
    assert np.linalg.norm(reference[1]) > 1e-3


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (InfoNCEConfig(), {}),
        (InfoNCEConfig(directions=ALL_DIRECTIONS), {"directions": ALL_DIRECTIONS}),
        (
            InfoNCEConfig(directions=("query_document", "document_query"), per_direction=True),
            {"directions": ("query_document", "document_query"), "partition_mode": "per_direction"},
        ),
        (InfoNCEConfig(hardness=5.0), {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}),
        (
            InfoNCEConfig(hardness=9.0, hardness_of="in_batch"),
            {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
        ),
    ],
    ids=["plain", "gte", "symmetric", "hard", "in_batch"],
)  # fmt: skip
def test_infonce_agrees_with_sentence_transformers(config: InfoNCEConfig, options: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    q, d = draw_unit_vectors(random, 5, 8), draw_unit_vectors(random, 5, 3, 8)
    if "directions" in options:
        names = tuple(name.replace("document", "doc").replace("_", "_to_") for name in options["directions"])
        options = options | {"directions": names}
    with jax.enable_x64(True):
        assert_agree(
            compute_ours(config, q, d), compute_torch(theirs.MultipleNegativesRankingLoss(None, scale=20.0, **options), q, d)
        )


def test_spread_out_agrees_with_sentence_transformers() -> None:
    random = np.random.default_rng(1)
    q, d = (draw_unit_vectors(random, *shape).astype(np.float32) + 0.3 for shape in ((7, 6), (7, 1, 6)))
    q, d = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, d))
    loss = theirs.GlobalOrthogonalRegularizationLoss(None, aggregation="sum")
    assert_agree(compute_ours(SpreadOutConfig(), q, d), compute_torch(loss, q, d))


def test_distillation_agrees_with_sentence_transformers() -> None:
    random = np.random.default_rng(1)
    q, d = draw_unit_vectors(random, 5, 8).astype(np.float32), draw_unit_vectors(random, 5, 3, 8).astype(np.float32)
    scores = random.normal(size=(5, 3)).astype(np.float32)
    batch = make_batch(list("abcde"), [[f"{c}{k}" for k in range(3)] for c in "abcde"])
    batch = batch.replace(teacher_scores=jax.device_put(scores))
    labels = torch.tensor(scores)
    reference = compute_torch(theirs.DistillKLDivLoss(None, temperature=0.5), q, d, labels)
    ours = compute_ours(DistillationConfig(temperature=0.5, teacher_temperature=0.5), q, d, batch)
    assert_agree(ours, (reference[0] / 0.5**2, reference[1] / 0.5**2))  # theirs is multiplied by the squared temperature
    assert_agree(compute_ours(MarginMSEConfig(), q, d, batch), compute_torch(theirs.MarginMSELoss(None), q, d, labels))


@pytest.mark.parametrize("width", [8, 5])
def test_embedding_matching_agrees_with_sentence_transformers(width: int) -> None:
    random = np.random.default_rng(1)
    q, d = draw_unit_vectors(random, 5, 8).astype(np.float32), draw_unit_vectors(random, 5, 3, 8).astype(np.float32)
    teacher = draw_unit_vectors(random, 5, 4, width).astype(np.float32)
    batch = make_batch(list("abcde"), [[f"{c}{k}" for k in range(3)] for c in "abcde"])
    batch = batch.replace(teacher=FrozenVectors(jnp.array(teacher[:, 0]), jnp.array(teacher[:, 1:])))
    config = EmbeddingMatchingConfig(teacher="a model")
    params = Objectives([config]).init_params(8, width, jax.random.key(0)).get("embedding_matching", {})
    loss = theirs.EmbedDistillLoss(None, distance_metric="cosine")
    if params:
        loss.projection = torch.nn.Linear(8, width, bias=False)
        loss.projection.weight.data = torch.tensor(np.asarray(params["kernel"]).T)
    reference = compute_torch(loss, q, d, [torch.tensor(teacher[:, i]) for i in range(4)])
    ours = compute_ours(config, q, d, batch, params)
    assert_agree(ours, (2 * reference[0], 2 * reference[1]))  # |a - b|^2 = 2 (1 - cos) of draw_unit_vectors vectors
