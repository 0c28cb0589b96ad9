"""Objectives for pairs with scores: constants, the published formulas over all pairs of pairs, and meshes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs

from helpers.text_batches import ALL_DIRECTIONS, draw_unit_vectors, make_batch, make_encoded
from jaxembed.config import (
    AnglEConfig,
    CoSENTConfig,
    CosineRegressionConfig,
    InfoNCEConfig,
    MatryoshkaConfig,
    ObjectiveConfig,
)
from jaxembed.data.batch import Batch
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import put_batch
from jaxembed.losses.graded import compute_angle_similarities, rank_by_score
from jaxembed.losses.objectives import VECTOR_OBJECTIVES, Objectives
from jaxembed.model.layers import l2_normalize

B, D = 16, 7  # an odd width: the angle similarity pads it
GRADED: tuple[ObjectiveConfig, ...] = (CoSENTConfig(), AnglEConfig(temperature=0.05), CosineRegressionConfig())
UAE: tuple[ObjectiveConfig, ...] = (
    CoSENTConfig(weight=1.0),
    InfoNCEConfig(weight=35.0, directions=ALL_DIRECTIONS, per_direction=True),
    AnglEConfig(weight=2.0),
)
SUMS = {**{config.name: (config,) for config in GRADED}, "uae": UAE}


def draw_scored_batch(random: np.random.Generator, count: int = B, unscored: tuple[int, ...] = ()) -> Batch:
    """Build a batch of pairs with scores of which some are equal, and none for the pairs `unscored`."""
    scores = random.integers(0, 6, count) / 5
    scores[list(unscored)] = np.nan
    batch = make_batch([f"q{i}" for i in range(count)], [[f"d{i}", None] for i in range(count)])
    return batch.replace(score=jnp.array(scores), is_positive=jnp.array(scores >= 0.8))


def draw_vectors(random: np.random.Generator, count: int = B, width: int = D) -> tuple[np.ndarray, np.ndarray]:
    return draw_unit_vectors(random, count, width), draw_unit_vectors(random, count, 2, width) * np.array([1, 0])[:, None]


def compute_loss(configs: Sequence[ObjectiveConfig], q: Any, d: Any, batch: Batch, shards: int = 1) -> jax.Array:
    """Return the sum of objectives of vectors that are not normalized yet."""
    q, d = l2_normalize(jnp.asarray(q)), l2_normalize(jnp.asarray(d))
    return Objectives(configs)(q, d, batch, jax.random.key(0), {}, shards)[0]


def rank_all_pairs(similarities: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the ranking loss from all pairs of pairs."""
    differences = (similarities[:, None] - similarities) / temperature
    return torch.logsumexp(torch.cat([torch.zeros(1), differences[scores[:, None] < scores]]), dim=0)


def test_constants() -> None:
    q = jnp.array([[1.0, 0.0]] * 3)
    d = jnp.array([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 1.0]]])
    batch = make_batch(list("abc"), [["x"], ["y"], ["z"]]).replace(score=jnp.array([0.2, 1.0, 0.2]))
    batch = batch.replace(is_positive=batch.score > 0.5)
    cosent, angle = CoSENTConfig(temperature=0.5), AnglEConfig()
    in_batch = InfoNCEConfig(temperature=0.5, weight=35.0, directions=ALL_DIRECTIONS, per_direction=True)
    sums = [cosent], [angle], [CosineRegressionConfig()], [cosent, in_batch, angle]
    angles, losses = jax.jit(
        lambda: (compute_angle_similarities(q, d[:, 0]), [compute_loss(configs, q, d, batch) for configs in sums])
    )()
    # z = 1 and w = 1, 0.6 + 0.8i, i: z / w = 1, 0.6 - 0.8i, -i.
    np.testing.assert_allclose(angles, [1, 0.2, 1], rtol=1e-6)
    # Only the middle pair has a higher score than another, and it has two such.
    expected = [
        math.log(1 + math.exp((1 - 0.6) / 0.5) + math.exp((0 - 0.6) / 0.5)),
        math.log(1 + 2 * math.exp(1 - 0.2)),
        (0.8**2 + 0.4**2 + 0.2**2) / 3,
    ]
    # UAE: the middle pair is the only positive, of cosine 0.6. The cosines of its query with the other documents are 1 and 0,
    # with the other queries 1 and 1; those of its document are 0.6 and 0.8, and 0.6 and 0.6.
    denominators = [sum(math.exp((cosine - 0.6) / 0.5) for cosine in (0.6, *x)) for x in ((1, 0, 1, 1), (0.6, 0.8, 0.6, 0.6))]
    expected.append(expected[0] + 35 * (math.log(denominators[0]) + math.log(denominators[1])) / 2 + expected[1])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_pairs_without_a_score_do_not_count() -> None:
    random = np.random.default_rng(0)
    (q, d), batch = (x.astype(np.float32) for x in draw_vectors(random)), draw_scored_batch(random, unscored=(0, 5, 9))
    kept = np.isfinite(np.asarray(batch.score))
    for config in GRADED:
        compute = jax.jit(jax.value_and_grad(lambda q, d, batch, c=config: compute_loss([c], q, d, batch)))
        value, gradient = compute(q, d, batch)
        alone, _ = compute(q[kept], d[kept], jax.tree.map(lambda x: x[kept], batch))
        assert float(value) == pytest.approx(float(alone), rel=1e-5)
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[~kept].any() and np.asarray(gradient)[kept].any()
        none, gradient = compute(q, d, batch.replace(score=jnp.full(B, jnp.nan)))
        assert float(none) == 0 and not np.asarray(gradient).any()
        one_score, _ = compute(q, d, batch.replace(score=jnp.full(B, 0.4)))
        assert (float(one_score) == 0) == (config.name != "cosine_regression")  # nothing to rank


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (CoSENTConfig(), theirs.CoSENTLoss(None)),
        (CoSENTConfig(temperature=0.5), theirs.CoSENTLoss(None, scale=2.0)),
        (AnglEConfig(temperature=0.05), theirs.AnglELoss(None)),
        (CosineRegressionConfig(), theirs.CosineSimilarityLoss(None)),
    ],
    ids=["cosent", "cosent 0.5", "angle", "cosine"],
)
def test_graded_objectives_agree_with_sentence_transformers(config: ObjectiveConfig, loss: Any) -> None:
    random = np.random.default_rng(1)
    (q, d), batch = draw_vectors(random), draw_scored_batch(random)
    leaf = torch.tensor(q * 3, requires_grad=True)  # any length
    labels = torch.tensor(np.asarray(batch.score, np.float64))
    value = loss.compute_loss_from_embeddings([leaf, torch.tensor(d[:, 0])], labels)
    value.backward()
    reference, expected = float(value.detach()), leaf.grad.numpy()
    with jax.enable_x64(True):
        batch = batch.replace(score=jnp.array(labels.numpy()))
        ours, gradient = jax.jit(jax.value_and_grad(lambda q: compute_loss([config], q, jnp.array(d), batch)))(jnp.array(q * 3))
    # CosineSimilarityLoss takes its labels as float32.
    assert float(ours) == pytest.approx(reference, rel=1e-6) and float(ours) > 0.1
    assert np.linalg.norm(gradient - expected) <= 1e-6 * np.linalg.norm(expected) and np.linalg.norm(expected) > 1e-3


def test_uae_is_its_three_objectives() -> None:
    """Value and gradient are those of AnglE's published formulas: two rankings, and cross-entropy of each text among all."""
    random = np.random.default_rng(2)
    (q, d), batch = draw_vectors(random, width=8), draw_scored_batch(random)
    scores, is_positive = torch.tensor(np.asarray(batch.score, np.float64)), torch.tensor(np.asarray(batch.is_positive))
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, d[:, 0])]
    x, y = (torch.nn.functional.normalize(leaf) for leaf in leaves)
    texts = torch.stack([x, y], dim=1).reshape(-1, 8)  # x0, y0, x1, y1, ...
    logits = (texts @ texts.T * 20).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * B) ^ 1
    # The published code averages over the other pairs too, as zeros.
    in_batch = torch.nn.functional.cross_entropy(logits, partner, reduction="none").reshape(B, 2)[is_positive].mean()
    cosine = rank_all_pairs((x * y).sum(dim=1), scores, 1 / 20)
    z, w = (torch.complex(side[:, :4], side[:, 4:]) for side in (x, y))
    ratio = z * w.conj()  # of unit vectors
    angle = rank_all_pairs(torch.abs((ratio.real + ratio.imag).sum(dim=1)), scores, 1.0)
    expected = cosine + 35 * in_batch + 2 * angle
    expected.backward()

    @jax.jit
    def compute(q: jax.Array, d: jax.Array) -> Any:
        def loss(q: jax.Array, d: jax.Array) -> Any:
            return Objectives(UAE)(l2_normalize(q), l2_normalize(d), batch, jax.random.key(0), {}, 1)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(q, d)

    (total, parts), grads = compute(jnp.array(q, jnp.float32), jnp.array(d, jnp.float32))
    assert float(parts["cosent"]) == pytest.approx(cosine.item(), rel=1e-5)
    assert float(parts["infonce"]) == pytest.approx(in_batch.item(), rel=1e-5)
    assert float(parts["angle"]) == pytest.approx(angle.item(), rel=1e-5)
    assert float(total) == pytest.approx(expected.item(), rel=1e-5)
    assert float(parts["cosent_pairs"]) == B and 0 < is_positive.sum() < B
    for ours, leaf in zip((grads[0], grads[1][:, 0]), leaves, strict=True):
        assert np.linalg.norm(ours - leaf.grad.numpy()) <= 1e-5 * np.linalg.norm(leaf.grad.numpy()) != 0


@pytest.mark.parametrize("name", SUMS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    random = np.random.default_rng(3)
    with jax.enable_x64(True):
        (q, d), batch = draw_vectors(random), draw_scored_batch(random, unscored=(3,))
        loss = jax.jit(lambda q, d: compute_loss(SUMS[name], q, d, batch))
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.array(q), jnp.array(d))
        direction, step = (random.normal(size=q.shape), random.normal(size=d.shape) * np.array([1, 0])[:, None]), 1e-6
        ahead, behind = (loss(q + s * direction[0], d + s * direction[1]) for s in (step, -step))
        slope = sum(float((g * w).sum()) for g, w in zip(gradient, direction, strict=True))
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("name", SUMS)
def test_eight_devices_rank_the_pairs_of_all(name: str) -> None:
    random = np.random.default_rng(4)
    (q, d), batch = draw_vectors(random), draw_scored_batch(random, unscored=(3,))
    inputs = (q.astype(np.float32), d.astype(np.float32), batch)

    def loss(q: jax.Array, d: jax.Array, batch: Batch) -> jax.Array:
        return compute_loss(SUMS[name], q, d, batch, shards=8)

    expected = jax.jit(jax.value_and_grad(loss))(*inputs)
    mesh = make_mesh(8)
    with jax.set_mesh(mesh):
        actual = jax.device_get(jax.jit(jax.value_and_grad(loss))(*put_batch(mesh, jax.device_get(inputs))))
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert np.linalg.norm(actual[1] - expected[1]) <= 1e-5 * np.linalg.norm(expected[1])


def test_memory_and_values_of_a_large_batch() -> None:
    def measure_temporary_bytes(count: int) -> int:
        numbers = jax.ShapeDtypeStruct((count,), jnp.float32)
        grad = jax.jit(jax.grad(lambda s, y: rank_by_score(s, y, jnp.isfinite(y), 0.05)))
        return int(grad.lower(numbers, numbers).compile().memory_analysis().temp_size_in_bytes)

    assert measure_temporary_bytes(65536) < 17 * measure_temporary_bytes(4096) < 65536**2 / 16
    random = np.random.default_rng(5)
    similarities, scores = random.uniform(-1, 1, 2048), random.integers(0, 26, 2048) / 25
    differences = (similarities[:, None] - similarities)[scores[:, None] < scores] / 0.05
    expected = np.logaddexp.reduce(np.append(differences, 0))
    rank = jax.jit(lambda s, y: rank_by_score(s, y, jnp.ones(2048, bool), 0.05))
    value = rank(jnp.array(similarities, jnp.float32), jnp.array(scores))
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_graded_objectives_at_matryoshka_widths() -> None:
    random = np.random.default_rng(6)
    (q, d), batch = draw_vectors(random, width=8), draw_scored_batch(random)
    q, d = jnp.array(q), jnp.array(d)
    objectives = Objectives(GRADED, MatryoshkaConfig(dims=(4,), weights=(0.5,)))
    total, parts = jax.jit(lambda q, d: objectives(q, d, batch, jax.random.key(0), {}, 1))(q, d)
    truncated = l2_normalize(q[:, :4]), l2_normalize(d[..., :4])
    expected = jax.jit(lambda q, d: [VECTOR_OBJECTIVES[c.name](c, make_encoded(q, d, batch))[0] for c in GRADED])(*truncated)
    assert [float(parts[f"{c.name}_4"]) for c in GRADED] == pytest.approx([float(x) for x in expected], rel=1e-5)
    assert float(total) == pytest.approx(sum(float(parts[c.name] + 0.5 * parts[f"{c.name}_4"]) for c in GRADED), rel=1e-5)
