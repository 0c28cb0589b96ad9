"""Objectives compared with code that stores the scores of all pairs, with constants, and with finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.text_batches import ALL_DIRECTIONS, draw_unit_vectors, make_batch, make_encoded
from helpers.training_batches import assert_trees_close
from jaxembed.config import (
    DistillationConfig,
    EmbeddingMatchingConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    MatryoshkaConfig,
    ObjectiveConfig,
    SpreadOutConfig,
)
from jaxembed.data.batch import Batch, FrozenVectors
from jaxembed.devices.mesh import make_mesh
from jaxembed.devices.placement import make_replicated_sharding, put_batch
from jaxembed.losses import blockwise, infonce
from jaxembed.losses.objectives import VECTOR_OBJECTIVES, Objectives

B, K, D, G = 8, 2, 6, 5
# Queries and documents repeat. Some sources have no in-batch negatives, some documents are absent, some queries have labels.
QUERIES = list("abcadefg")
DOCUMENTS: list[list[str | None]] = [
    ["pa", "x", None], ["pb", "pa", "y"], ["pc", "z", "z2"], ["pd", None, None],
    ["a", "w", "x"], ["pe", "b", "x2"], ["pf", "f", "x3"], ["pg", "g2", None],
]  # fmt: skip
POSITIVES = [[row[0], *more] for row, more in zip(DOCUMENTS, [["pa2"], [], ["x"], [], ["c"], ["pf"], [], ["y"]], strict=True)]
IN_BATCH = [True, False, True, True, True, True, True, True]
LABELS, SOURCES = [0, 0, 1, -1, 1, -1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]


def draw_batch(random: np.random.Generator, dtype: Any = jnp.float64) -> Batch:
    guide = FrozenVectors(
        jnp.array(draw_unit_vectors(random, B, G), dtype), jnp.array(draw_unit_vectors(random, B, 1 + K, G), dtype)
    )
    scores = np.where(random.uniform(size=(B, 1 + K)) < 0.2, np.nan, random.normal(size=(B, 1 + K)))
    batch = make_batch(QUERIES, DOCUMENTS, IN_BATCH, POSITIVES)
    return batch.replace(
        label=jnp.array(LABELS), source=jnp.array(SOURCES), guide=guide, teacher=guide, teacher_scores=jnp.array(scores)
    )


def draw_vectors(random: np.random.Generator, dtype: Any = jnp.float64) -> tuple[jax.Array, jax.Array]:
    present = np.array([[text is not None for text in row] for row in DOCUMENTS])
    return jnp.array(draw_unit_vectors(random, B, D), dtype), jnp.array(
        draw_unit_vectors(random, B, 1 + K, D) * present[..., None], dtype
    )


TEXTS = {
    "query": [(i, 0, text) for i, text in enumerate(QUERIES)],
    "document": [(i, k, text) for i, row in enumerate(DOCUMENTS) for k, text in enumerate(row)],
}  # query index, document index, text


def find_negatives(config: InfoNCEConfig, q: jax.Array, d: jax.Array, batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each direction, text by text, True where a pair is a negative, and the hardness of each pair: [B, N] each."""
    vectors = {"query": np.asarray(q), "document": np.asarray(d).reshape(-1, D)}
    guide = {"query": np.asarray(batch.guide.queries), "document": np.asarray(batch.guide.documents).reshape(-1, G)}
    negatives = []
    for direction in config.directions:
        anchor_kind, candidate_kind = direction.split("_")
        shape = (B, len(TEXTS[candidate_kind]))
        is_negative, hardness = np.zeros(shape, bool), np.zeros(shape)
        for i, (n, (j, k, text)) in itertools.product(range(B), enumerate(TEXTS[candidate_kind])):
            anchor = i if anchor_kind == "query" else i * (1 + K)  # index among the texts of its kind
            is_own = i == j and direction == "query_document" and k > 0
            is_in_batch = i != j and IN_BATCH[i] and IN_BATCH[j] and QUERIES[i] != QUERIES[j]
            is_false_negative = text in POSITIVES[i] or (
                candidate_kind == "query" and TEXTS[anchor_kind][anchor][2] in POSITIVES[j]
            )
            is_false_negative |= config.mask_same_label and LABELS[i] == LABELS[j] >= 0 and SOURCES[i] == SOURCES[j]
            if config.margin is not None:
                positive = vectors["query"][i] @ vectors["document"][i * (1 + K)]
                is_false_negative |= vectors[anchor_kind][anchor] @ vectors[candidate_kind][n] > positive + config.margin
            if config.guide is not None:
                threshold = guide["query"][i] @ guide["document"][i * (1 + K)]
                relative = config.guide_margin_kind == "relative"
                threshold -= config.guide_margin * (abs(threshold) if relative else 1)
                is_false_negative |= guide[anchor_kind][anchor] @ guide[candidate_kind][n] > threshold
            is_selected = {"all": is_own or is_in_batch, "hard": is_own, "in_batch": is_in_batch}[config.negatives]
            is_negative[i, n] = is_selected and text is not None and not is_false_negative
            if direction == "query_document" and config.hardness_of in ("hard" if is_own else "in_batch", "all"):
                hardness[i, n] = config.hardness
        negatives.append((is_negative, hardness))
    return negatives


def compute_plain_losses(
    config: InfoNCEConfig, q: torch.Tensor, d: torch.Tensor, pairs: list[tuple[np.ndarray, np.ndarray]]
) -> torch.Tensor:
    """Return the loss of each query from the scores of all pairs, in PyTorch, which compiles nothing."""
    anchors = {"query": q, "document": d[:, 0]}
    candidates = {"query": q, "document": d.reshape(-1, D)}
    positive = torch.einsum("bd,bd->b", q, d[:, 0])[:, None] / config.temperature
    denominators = [[positive]]
    for direction, (is_negative, hardness) in zip(config.directions, pairs, strict=True):
        anchor_kind, candidate_kind = direction.split("_")
        scores = torch.einsum("bd,nd->bn", anchors[anchor_kind], candidates[candidate_kind])
        if direction == "document_query":
            denominators += [[]] if config.per_direction else []
            denominators[-1].append(positive)
        logits = scores / config.temperature + torch.tensor(hardness, dtype=scores.dtype) * scores.detach()
        denominators[-1].append(logits.masked_fill(~torch.tensor(is_negative), -torch.inf))
    direction_losses = [torch.logsumexp(torch.cat(terms, dim=1), dim=1) - positive[:, 0] for terms in denominators]
    losses = torch.stack(direction_losses).mean(dim=0)
    return losses * (1 - torch.exp(-losses)) ** config.focal if config.focal else losses


INFONCE = {
    "default": InfoNCEConfig(temperature=0.1),
    "hard": InfoNCEConfig(temperature=0.1, negatives="hard"),
    "in_batch": InfoNCEConfig(temperature=0.1, negatives="in_batch"),
    "gte": InfoNCEConfig(temperature=0.1, directions=ALL_DIRECTIONS),
    "samtone": InfoNCEConfig(temperature=0.1, directions=ALL_DIRECTIONS[:2]),
    "symmetric": InfoNCEConfig(temperature=0.1, directions=("query_document", "document_query"), per_direction=True),
    "labels": InfoNCEConfig(temperature=0.1, directions=ALL_DIRECTIONS, mask_same_label=True),
    "margin": InfoNCEConfig(temperature=0.1, directions=ALL_DIRECTIONS, margin=0.1),
    "guide": InfoNCEConfig(temperature=0.1, directions=ALL_DIRECTIONS, guide="a model", guide_margin=0.05),
    "relative guide": InfoNCEConfig(temperature=0.1, guide="a model", guide_margin=0.05, guide_margin_kind="relative"),
    "focal": InfoNCEConfig(temperature=0.1, focal=0.5),
    "hardness": InfoNCEConfig(temperature=0.1, hardness=5.0),
    "hardness of all": InfoNCEConfig(temperature=0.1, hardness=9.0, hardness_of="all"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "devices", "dtype"),
    [*itertools.product(INFONCE, [8], ["float64"]), ("gte", 1, "float64"), ("gte", 1, "float32"), ("guide", 8, "float32")],
)
def test_blockwise_infonce_agrees_with_the_plain_form(
    name: str, devices: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients agree with blocks of three candidates, on one device and with queries split over eight."""
    config, random = INFONCE[name], np.random.default_rng(0)
    monkeypatch.setattr(blockwise, "MAX_SCORES_PER_BLOCK", 3 * B // devices)
    with jax.enable_x64(dtype == "float64"):
        (q, d), batch = draw_vectors(random, dtype), draw_batch(random, dtype)
        leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (q, d)]
        expected = compute_plain_losses(config, *leaves, find_negatives(config, q, d, batch)).mean()
        expected.backward()
        mesh = make_mesh(devices)

        def loss(q: jax.Array, d: jax.Array, batch: Batch) -> jax.Array:
            return infonce.info_nce(config, make_encoded(q, d, batch, devices))[0]

        with jax.set_mesh(mesh):
            inputs = put_batch(mesh, jax.device_get((q, d, batch)))
            actual = jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*inputs))
    tolerance = 1e-9 if dtype == "float64" else 1e-5
    assert expected.item() > 0.1
    assert abs(actual[0] - expected.item()) < tolerance
    for ours, leaf in zip(actual[1], leaves, strict=True):
        reference = leaf.grad.numpy()
        assert np.linalg.norm(ours - reference) <= tolerance * np.linalg.norm(reference)
        assert np.linalg.norm(reference) > 0.01


def test_every_option_changes_the_loss() -> None:
    random = np.random.default_rng(0)
    (q, d), batch = draw_vectors(random, jnp.float32), draw_batch(random, jnp.float32)
    compute = jax.jit(lambda *x: {name: infonce.info_nce(config, make_encoded(*x))[0] for name, config in INFONCE.items()})
    values = compute(q, d, batch)
    losses = {name: float(value) for name, value in values.items()}
    assert len({round(value, 4) for value in losses.values()}) == len(losses), losses


def test_memory_grows_with_the_batch_not_with_its_square() -> None:
    def measure_temporary_bytes(count: int, config: InfoNCEConfig) -> int:
        shapes = jax.eval_shape(lambda: make_batch(["a"] * 8, [["b", "c"]] * 8))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), shapes)
        q, d = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((count, 16), (count, 2, 16)))
        grad = jax.jit(jax.grad(lambda q, d, b: infonce.info_nce(config, make_encoded(q, d, b))[0], argnums=(0, 1)))
        return int(grad.lower(q, d, batch).compile().memory_analysis().temp_size_in_bytes)

    for config in (InfoNCEConfig(), InfoNCEConfig(directions=ALL_DIRECTIONS, margin=0.1, mask_same_label=True)):
        small, large = measure_temporary_bytes(4096, config), measure_temporary_bytes(65536, config)
        assert large < 17 * small
        assert large < 65536**2 / 4  # a sixteenth of all scores


def test_hard_labels_and_missing_scores_equal_constants() -> None:
    q, d = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]] * 2)
    scores = jnp.array([[2.0, 1.0, math.nan], [1.0, math.nan, math.nan]])  # the second query has one scored document
    batch = make_batch(["a", "b"], [["pa", "x", "y"], ["pb", "z", "w"]]).replace(teacher_scores=scores)
    p = 1 / (1 + math.exp(-0.4 / 0.5))
    t = 1 / (1 + math.exp(-1.0))
    kl = t * math.log(t / p) + (1 - t) * math.log((1 - t) / (1 - p))
    config = DistillationConfig(temperature=0.5, hard_labels=0.2)
    loss, metrics = jax.jit(lambda: VECTOR_OBJECTIVES["kl_distillation"](config, make_encoded(q, d, batch)))()
    assert float(loss) == pytest.approx(0.8 * kl - 0.2 * math.log(p), rel=1e-5)
    assert float(metrics["scored"]) == 1
    assert float(VECTOR_OBJECTIVES["margin_mse"](MarginMSEConfig(), make_encoded(q, d, batch))[0]) == pytest.approx(
        (0.4 - 1.0) ** 2
    )
    gradient = jax.jit(jax.grad(lambda d: VECTOR_OBJECTIVES["kl_distillation"](config, make_encoded(q, d, batch))[0]))(d)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[1].any() and not np.asarray(gradient)[0, 2].any()


def test_embedding_matching_equals_constants() -> None:
    """The first query and its document have squared distances 0 and 0.8, the second and its documents 2, 0.8 and 0."""
    q, d = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.8, 0.6], [0.6, 0.8]]])
    batch = make_batch(["a", "b"], [["x", None], ["y", "z"]])
    teacher = FrozenVectors(
        jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[[0.6, 0.8], [0.0, 1.0]], [[0.0, 1.0], [0.6, 0.8]]])
    )
    config = EmbeddingMatchingConfig(teacher="a model")
    loss = jax.jit(lambda: VECTOR_OBJECTIVES[config.name](config, make_encoded(q, d, batch.replace(teacher=teacher)))[0])()
    assert float(loss) == pytest.approx(((0 + 0.8) / 2 + (2 + 0.8 + 0) / 3) / 2, rel=1e-6)


def test_embedding_matching_through_a_projection() -> None:
    random = np.random.default_rng(1)
    (q, d), batch = draw_vectors(random, jnp.float32), draw_batch(random, jnp.float32)
    config = EmbeddingMatchingConfig(teacher="a model")
    params = jax.jit(lambda: Objectives([config]).init_params(D, G, jax.random.key(0)))()
    kernel = np.asarray(params["embedding_matching"]["kernel"])
    assert kernel.shape == (D, G) and Objectives([config]).init_params(G, G, jax.random.key(0)) == {}
    queries, documents, teacher = jax.device_get((q, d, batch.teacher))
    total = 0.0
    for i, row in enumerate(DOCUMENTS):
        document_pairs = [(documents[i, k], teacher.documents[i, k]) for k, text in enumerate(row) if text]
        pairs = [(queries[i], teacher.queries[i]), *document_pairs]
        ours = [x @ kernel for x, _ in pairs]
        total += np.mean([np.sum((x / np.linalg.norm(x) - y) ** 2) for x, (_, y) in zip(ours, pairs, strict=True)]) / B
    encoded = make_encoded(q, d, batch, params=params["embedding_matching"])
    loss = jax.jit(lambda: VECTOR_OBJECTIVES["embedding_matching"](config, encoded)[0])()
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_mixed_negatives_lie_between_two_of_the_query() -> None:
    negatives = jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]] * 2)
    present = jnp.array([[True, True, False], [True, False, False]])
    mixed, mixed_present = jax.jit(lambda: infonce._mix_negatives(64, negatives, present, jax.random.key(0)))()
    assert np.asarray(mixed_present).tolist() == [[True] * 64, [False] * 64]
    first = np.asarray(mixed)[0]
    assert np.allclose(np.linalg.norm(first, axis=-1), 1, atol=1e-6) and not first[:, 2].any()
    weight = first[:, 0] / (first[:, 0] + first[:, 1])
    assert 0.4 < weight.mean() < 0.6 and 0.03 < weight.var() < 0.07  # Beta(2, 2): 1/2 and 1/20
    q = jnp.array(draw_unit_vectors(np.random.default_rng(0), 2, 3), jnp.float32)
    batch = make_batch(["a", "b"], [["pa", "x", "y", None], ["pb", "z", None, None]])
    documents = jnp.concatenate([q[:, None], negatives * present[..., None]], axis=1)
    config = InfoNCEConfig(negatives="hard", mixed_negatives=4)
    _, metrics = jax.jit(lambda: infonce.info_nce(config, make_encoded(q, documents, batch)))()
    assert float(metrics["negatives"]) == pytest.approx((2 + 4 + 1) / 2)


def test_a_learned_temperature_has_a_gradient_and_a_minimum() -> None:
    random = np.random.default_rng(1)
    (q, d), batch = draw_vectors(random, jnp.float32), draw_batch(random, jnp.float32)
    config = InfoNCEConfig(temperature=0.2, learn_temperature=True)

    @jax.jit
    def loss(log_scale: jax.Array) -> jax.Array:
        return infonce.info_nce(config, make_encoded(q, d, batch, params={"log_scale": log_scale}))[0]

    start = infonce.init_temperature(config)["log_scale"]
    fixed = jax.jit(lambda: infonce.info_nce(InfoNCEConfig(temperature=0.2), make_encoded(q, d, batch))[0])()
    assert float(loss(start)) == pytest.approx(float(fixed), rel=1e-6)
    slope = (loss(start + 1e-2) - loss(start - 1e-2)) / 2e-2
    assert float(jax.jit(jax.grad(loss))(start)) == pytest.approx(float(slope), rel=1e-2)
    assert float(loss(jnp.array(9.0))) == pytest.approx(float(loss(jnp.array(math.log(100.0)))))


def test_matryoshka_adds_the_losses_of_the_first_dimensions() -> None:
    random = np.random.default_rng(1)
    (q, d), batch = draw_vectors(random, jnp.float32), draw_batch(random, jnp.float32)
    chosen, key = [InfoNCEConfig(temperature=0.1), SpreadOutConfig(weight=2.0)], jax.random.key(0)
    objectives = Objectives(chosen, MatryoshkaConfig(dims=(4, 2), weights=(0.3, 0.1)))
    total, parts = jax.jit(lambda q, d: objectives(q, d, batch, key, {}, 1))(q, d)

    def compute_losses(width: int) -> dict[str, float]:
        first = [x[..., :width] / np.maximum(np.linalg.norm(x[..., :width], axis=-1, keepdims=True), 1e-9) for x in (q, d)]
        losses = jax.jit(lambda *first: [VECTOR_OBJECTIVES[c.name](c, make_encoded(*first, batch))[0] for c in chosen])(*first)
        return {c.name: float(loss) for c, loss in zip(chosen, losses, strict=True)}

    whole, four, two = compute_losses(D), compute_losses(4), compute_losses(2)
    assert float(parts["infonce_4"]) == pytest.approx(four["infonce"], rel=1e-5)
    expected = sum(w * (whole[n] + 0.3 * four[n] + 0.1 * two[n]) for n, w in (("infonce", 1.0), ("spread_out", 2.0)))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert {"infonce", "infonce_accuracy", "spread_out", "spread_out_2"} < set(parts)


def test_eight_devices_compute_the_objectives_of_one() -> None:
    """Regularization, distillation, a learned temperature and drawn negatives, at two widths. Values and gradients."""
    infonce_keys = {"learn_temperature": True, "guide": "a model", "mixed_negatives": 2, "hardness": 2.0, "focal": 0.5}
    objectives = Objectives(
        [
            InfoNCEConfig(temperature=0.2, **infonce_keys), SpreadOutConfig(), DistillationConfig(hard_labels=0.2),
            MarginMSEConfig(), EmbeddingMatchingConfig(teacher="a model"),
        ],
        MatryoshkaConfig(dims=(4,)),
    )  # fmt: skip
    random, key = np.random.default_rng(4), jax.random.key(0)
    (q, d), batch = draw_vectors(random, jnp.float32), draw_batch(random, jnp.float32)
    params = jax.jit(lambda: objectives.init_params(D, G, key))()
    results = []
    for devices in (1, 8):
        mesh = make_mesh(devices)

        def loss(
            params: Any, q: jax.Array, d: jax.Array, batch: Batch, shards: int = devices
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objectives(q, d, batch, key, params, shards)

        with jax.set_mesh(mesh):
            inputs = put_batch(mesh, jax.device_get((q, d, batch)))
            compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            results.append(jax.device_get(compute(jax.device_put(params, make_replicated_sharding(mesh)), *inputs)))
    ((_, parts), grads), ((_, sharded_parts), sharded_grads) = results
    assert {"infonce_4", "spread_out_4", "kl_distillation_4", "margin_mse_4", "embedding_matching"} < parts.keys()
    for name, part in parts.items():
        assert float(sharded_parts[name]) == pytest.approx(float(part), rel=1e-5), name
    assert_trees_close(grads, sharded_grads)


def test_an_objective_of_some_sources_is_the_mean_over_their_queries() -> None:
    random = np.random.default_rng(1)
    (q, d), batch = draw_vectors(random, jnp.float32), draw_batch(random, jnp.float32)
    config, names, key = InfoNCEConfig(temperature=0.1), ("one", "two"), jax.random.key(0)
    chosen = [config.model_copy(update={"sources": ("one",)}), config.model_copy(update={"sources": ("two",)})]
    objectives = Objectives(chosen, source_names=names)
    _, parts = jax.jit(lambda q, d: objectives(q, d, batch, key, {}, 1))(q, d)
    leaves = (torch.tensor(np.asarray(x)) for x in (q, d))
    losses = compute_plain_losses(config, *leaves, find_negatives(config, q, d, batch)).numpy()
    assert float(parts["infonce"]) == pytest.approx(losses[np.array(SOURCES) == 0].mean(), rel=1e-5)
    assert float(parts["infonce_2"]) == pytest.approx(losses[np.array(SOURCES) == 1].mean(), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        INFONCE["gte"], INFONCE["guide"], INFONCE["focal"], SpreadOutConfig(), DistillationConfig(), MarginMSEConfig(),
        EmbeddingMatchingConfig(teacher="a model"),
    ],
    ids=lambda config: config.name,
)  # fmt: skip
def test_gradients_agree_with_finite_differences(config: ObjectiveConfig) -> None:
    random = np.random.default_rng(2)
    with jax.enable_x64(True):
        (q, d), batch = draw_vectors(random), draw_batch(random)
        params = Objectives([config]).init_params(D, G, jax.random.key(0)).get(config.name, {})

        @jax.jit
        def loss(q: jax.Array, d: jax.Array) -> jax.Array:
            return VECTOR_OBJECTIVES[config.name](config, make_encoded(q, d, batch, params=params))[0]

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(q, d)
        direction, step = (random.normal(size=q.shape), random.normal(size=d.shape)), 1e-6
        ahead, behind = (loss(q + s * direction[0], d + s * direction[1]) for s in (step, -step))
        slope = sum(float((g * w).sum()) for g, w in zip(gradient, direction, strict=True))
        assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6)
        assert abs(slope) > 1e-4
