"""InfoNCE and its masks compared with constants, a loop over single pairs, and finite differences."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.text_batches import TextRows, draw_unit_vectors, make_batch
from jaxembed.config import InfoNCEConfig
from jaxembed.data.batch import Batch
from jaxembed.losses.encoded import EncodedBatch
from jaxembed.losses.infonce import info_nce
from jaxembed.losses.negatives import collect_text_info, in_batch_candidates, is_known_positive
from jaxembed.model.layers import l2_normalize
from jaxembed.training.gradcache import gather_vectors


def compute_negative_mask(*args: Any, **options: Any) -> list[list[int]]:
    """Return 1 where a document (column) is an own or an in-batch negative of a query (row), else 0.

    The columns are the documents of the first query (positive, then its own negatives), then those of the second, and so on.
    """
    return np.asarray(find_negatives(make_batch(*args, **options))).astype(int).tolist()


@jax.jit
def find_negatives(batch: Batch) -> jax.Array:
    count, per_query = batch.doc_slot.shape
    queries, documents = collect_text_info(batch)
    queries, documents = queries.reshape(count, 1), documents.reshape(count * per_query)
    column = jnp.arange(count * per_query)
    is_own = (jnp.arange(count)[:, None] == column // per_query) & (column % per_query > 0)
    return (is_own | in_batch_candidates(queries, documents)) & documents.is_present & ~is_known_positive(queries, documents)


def test_own_and_in_batch_negatives_are_used() -> None:
    assert compute_negative_mask(["a", "b"], [["pa", "x"], ["pb", None]]) == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_texts_of_a_source_without_in_batch_negatives_neither_have_nor_are_negatives() -> None:
    documents: TextRows = [["pa", "x"], ["pb", "y"], ["pc", "z"]]
    assert compute_negative_mask(["a", "b", "c"], documents, in_batch=[True, False, True]) == [
        [0, 1, 0, 0, 1, 1],
        [0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_documents_of_an_equal_query_are_not_negatives() -> None:
    assert compute_negative_mask(["a", "a", "c"], [["pa", "x"], ["pb", "y"], ["pc", "z"]]) == [
        [0, 1, 0, 0, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 0, 1],
    ]


def test_known_positives_are_not_negatives() -> None:
    documents: TextRows = [["pa", "pb"], ["pb", "x"], ["pa2", "pa"]]
    assert compute_negative_mask(["a", "b", "c"], documents, positives=[["pa", "pa2"], ["pb"], ["pa2"]]) == [
        [0, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 0, 1],
    ]


@functools.partial(jax.jit, static_argnums=3)
def compute_info_nce(q: jax.Array, d: jax.Array, batch: Batch, temperature: float) -> Any:
    weights = jnp.full(len(q), 1 / len(q), q.dtype)
    return info_nce(InfoNCEConfig(temperature=temperature), EncodedBatch(q, d, batch, weights, jax.random.key(0)))


def test_loss_of_two_queries_equals_a_constant() -> None:
    queries, documents = jnp.eye(2), jnp.array([[[1.0, 0.0]], [[0.6, 0.8]]])
    loss, metrics = compute_info_nce(queries, documents, make_batch(["a", "b"], [["pa"], ["pb"]]), 0.5)
    # log(1 + e^(1.2 - 2)) = 0.3711007 and log(1 + e^(0 - 1.6)) = 0.1839010
    assert float(loss) == pytest.approx(0.2775007, abs=1e-6)
    assert (float(metrics["accuracy"]), float(metrics["negatives"])) == (1.0, 1.0)


def test_a_hard_negative_above_the_positive_equals_a_constant() -> None:
    queries, documents = jnp.array([[1.0, 0.0]]), jnp.array([[[0.6, 0.8], [0.8, 0.6], [0.0, 0.0]]])
    loss, metrics = compute_info_nce(queries, documents, make_batch(["a"], [["pa", "x", None]]), 0.1)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)
    assert (float(metrics["accuracy"]), float(metrics["negatives"])) == (0.0, 1.0)


def test_the_lowest_temperature_does_not_overflow() -> None:
    queries, documents = jnp.eye(2), jnp.array([[[0.0, 1.0]], [[1.0, 0.0]]])  # every positive is the farthest document
    loss = compute_info_nce(queries, documents, make_batch(["a", "b"], [["pa"], ["pb"]]), 0.001)[0]
    assert float(loss) == pytest.approx(1000.0)


def test_a_query_without_negatives_has_neither_loss_nor_gradient() -> None:
    queries, documents = jnp.eye(2), jnp.eye(2)[:, None]
    batch = make_batch(["a", "b"], [["pa"], ["pb"]], in_batch=[False, False])
    loss_and_grad = jax.jit(jax.value_and_grad(lambda q, d: compute_info_nce(q, d, batch, 0.1)[0], argnums=(0, 1)))
    loss, grads = loss_and_grad(queries, documents)
    assert float(loss) == 0.0
    assert not any(np.asarray(grad).any() for grad in grads)


WORDS = list("abcdefgh")


@st.composite
def draw_cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """Draw batches from few words, so that queries and documents repeat.

    Returns:
        queries [B], documents [B, M], whether each query has in-batch negatives [B], positives of each query, and a seed.
    """
    b, m = draw(st.sampled_from([(1, 3), (4, 1), (4, 3)]))
    word = st.sampled_from(WORDS)
    queries = [draw(word) for _ in range(b)]
    documents = [[draw(word), *[draw(st.none() | word) for _ in range(m - 1)]] for _ in range(b)]
    positives = [[row[0], *draw(st.lists(word, max_size=2))] for row in documents]
    return queries, documents, [draw(st.booleans()) for _ in range(b)], positives, draw(st.integers(0, 1000))


def compute_by_loop(q: np.ndarray, d: np.ndarray, case: tuple[Any, ...], temperature: float) -> tuple[float, float]:
    """Return the mean loss and the mean number of negatives per query, computed pair by pair."""
    queries, documents, in_batch, positives, _ = case
    losses, count = [], 0
    for i in range(len(queries)):
        total = math.exp(q[i] @ d[i, 0] / temperature)
        for j, row in enumerate(documents):
            for m, text in enumerate(row):
                is_own = i == j and m > 0
                is_in_batch = i != j and in_batch[i] and in_batch[j] and queries[i] != queries[j]
                if text is not None and text not in positives[i] and (is_own or is_in_batch):
                    total += math.exp(q[i] @ d[j, m] / temperature)
                    count += 1
        losses.append(-math.log(math.exp(q[i] @ d[i, 0] / temperature) / total))
    return sum(losses) / len(losses), count / len(losses)


@given(draw_cases())
def test_any_batch_agrees_with_the_loop(case: tuple[Any, ...]) -> None:
    queries, documents, in_batch, positives, seed = case
    random = np.random.default_rng(seed)
    q, d = draw_unit_vectors(random, len(queries), 6), draw_unit_vectors(random, len(queries), len(documents[0]), 6)
    loss, metrics = compute_info_nce(
        jax.device_put(q), jax.device_put(d), make_batch(queries, documents, in_batch, positives), 0.2
    )
    expected, negatives = compute_by_loop(q, d, case, 0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(metrics["negatives"]) == pytest.approx(negatives)


DOCUMENTS: TextRows = [["pa", "x", None], ["pb", "pa", "y"], ["pc", "z", "z2"], ["pd", None, None]]
MIXED = make_batch(list("abca"), DOCUMENTS, in_batch=[True, False, True, True], positives=[["pa"], ["pb"], ["pc", "x"], ["pd"]])


def test_gradients_agree_with_finite_differences() -> None:
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, d = jax.device_put(draw_unit_vectors(random, 4, 6)), jax.device_put(draw_unit_vectors(random, 4, 3, 6))

        def loss(q: jax.Array, d: jax.Array) -> jax.Array:
            return compute_info_nce(q, d, MIXED, 0.1)[0]

        assert loss(q, d).dtype == jnp.float64
        gradient = jax.grad(loss, argnums=(0, 1))(q, d)
        for _ in range(5):
            direction, step = (random.normal(size=q.shape), random.normal(size=d.shape)), 1e-6
            ahead, behind = (loss(q + s * direction[0], d + s * direction[1]) for s in (step, -step))
            slope = sum(float((g * w).sum()) for g, w in zip(gradient, direction, strict=True))
            assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6)
            assert abs(slope) > 1e-3


def test_gradients_do_not_cross_between_texts_that_are_not_negatives() -> None:
    random = np.random.default_rng(0)
    q, d = jax.device_put(draw_unit_vectors(random, 4, 6)), jax.device_put(draw_unit_vectors(random, 4, 3, 6))
    query_gradient = jax.grad(lambda q, d: compute_info_nce(q, d, MIXED, 0.1)[0])
    crossing = np.abs(jax.jit(jax.jacobian(query_gradient, argnums=1))(q, d)).sum(axis=(1, 4))  # [query, owner, document]
    crosses = crossing.sum(axis=2) > 0
    # The second query's source has no in-batch negatives; the first and the last query are equal.
    assert crosses.astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]
    assert crossing[0, 0, 2] == 0.0  # absent
    assert crossing[2, 0, 1] == 0.0  # "x" is a positive of the third query
    assert crossing[2, 0, 0] > 0


def test_absent_slots_have_zero_vectors_and_gradients() -> None:
    vectors = jnp.array(np.random.default_rng(0).normal(size=(4, 2, 6)), jnp.float32)
    slots = jnp.array([[0, -1], [3, 1], [-1, -1], [2, 0]])

    def total(vectors: jax.Array) -> jax.Array:
        return jnp.sum(gather_vectors(vectors, slots, shards=2) * jnp.arange(1.0, 7))

    picked = np.asarray(jax.jit(lambda: gather_vectors(vectors, slots, shards=2))())
    flat = np.asarray(vectors).reshape(8, 6)
    expected = [flat[0], None, flat[3], flat[1], None, None, flat[6], flat[4]]
    for ours, reference in zip(picked.reshape(8, 6), expected, strict=True):
        assert np.abs(ours - (0.0 if reference is None else reference / np.linalg.norm(reference))).max() < 1e-6
    gradient = np.asarray(jax.jit(jax.grad(total))(vectors)).reshape(8, 6)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).sum(axis=1) > 0).tolist() == [True, True, False, True, True, False, True, False]


def test_slots_without_a_text_have_zero_gradients() -> None:
    vectors = jnp.array(np.random.default_rng(0).normal(size=(1, 8, 6))).at[:, 6:].set(0.0)
    batch = make_batch(["a", "b"], [["pa", "x"], ["pb", None]]).replace(
        query_slot=jnp.array([0, 1]), doc_slot=jnp.array([[2, 3], [4, -1]])
    )

    def loss(vectors: jax.Array) -> jax.Array:
        unit_vectors = l2_normalize(vectors)
        queries, documents = gather_vectors(unit_vectors, batch.query_slot, 1), gather_vectors(unit_vectors, batch.doc_slot, 1)
        return compute_info_nce(queries, documents, batch, 0.1)[0]

    gradient = np.asarray(jax.jit(jax.grad(loss))(vectors))[0]
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).sum(axis=1) > 0).tolist() == [True] * 5 + [False] * 3


def test_l2_normalize_keeps_zero_and_direction() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]])
    assert np.allclose(jax.jit(l2_normalize)(x), [[0.6, 0.8], [0, 0], [1, 0]])
    assert np.isfinite(jax.jit(jax.grad(lambda x: l2_normalize(x).sum()))(x)).all()
