"""InfoNCE and its masks, against constants, a plain loop and finite differences."""

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
from jaxembed.losses.encoded import Encoded
from jaxembed.losses.infonce import info_nce
from jaxembed.losses.negatives import in_batch_candidates, known_positive, texts_of
from jaxembed.model.layers import unit_length
from jaxembed.training.gradcache import pick


def mask_of(*args: Any, **options: Any) -> list[list[int]]:
    """Rows of queries, columns of documents: a query's own further ones, and those that others lend it."""
    batch = make_batch(*args, **options)
    count, per_query = batch.doc_slot.shape
    queries, documents = texts_of(batch)
    queries, documents = queries.reshape(count, 1), documents.reshape(count * per_query)
    column = jnp.arange(count * per_query)
    hard = (jnp.arange(count)[:, None] == column // per_query) & (column % per_query > 0)
    mask = (hard | in_batch_candidates(queries, documents)) & documents.present & ~known_positive(queries, documents)
    return np.asarray(mask).astype(int).tolist()


# The columns of a mask: query-major, the positive of a query and then its own negatives.


def test_own_negatives_and_the_documents_of_others() -> None:
    assert mask_of(["a", "b"], [["A", "x"], ["B", None]]) == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_a_source_without_in_batch_negatives_neither_uses_nor_lends() -> None:
    documents: TextRows = [["A", "x"], ["B", "y"], ["C", "z"]]
    assert mask_of(["a", "b", "c"], documents, in_batch=[True, False, True]) == [
        [0, 1, 0, 0, 1, 1],
        [0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_documents_of_an_equal_query_are_no_negatives() -> None:
    assert mask_of(["a", "a", "c"], [["A", "x"], ["B", "y"], ["C", "z"]]) == [
        [0, 1, 0, 0, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 0, 1],
    ]


def test_no_known_positive_is_a_negative() -> None:
    documents: TextRows = [["A", "B"], ["B", "x"], ["A2", "A"]]
    assert mask_of(["a", "b", "c"], documents, positives=[["A", "A2"], ["B"], ["A2"]]) == [
        [0, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 0, 1],
    ]


@functools.partial(jax.jit, static_argnums=3)
def compiled(q: jax.Array, d: jax.Array, batch: Batch, temperature: float) -> Any:
    share = jnp.full(len(q), 1 / len(q), q.dtype)
    return info_nce(InfoNCEConfig(temperature=temperature), Encoded(q, d, batch, share, jax.random.key(0)))


def test_the_loss_of_two_queries_is_the_constant_computed_by_hand() -> None:
    queries, documents = jnp.eye(2), jnp.array([[[1.0, 0.0]], [[0.6, 0.8]]])
    loss, metrics = compiled(queries, documents, make_batch(["a", "b"], [["A"], ["B"]]), 0.5)
    # log(1 + e^(1.2 - 2)) = 0.3711007 and log(1 + e^(0 - 1.6)) = 0.1839010
    assert float(loss) == pytest.approx(0.2775007, abs=1e-6)
    assert (float(metrics["accuracy"]), float(metrics["negatives"])) == (1.0, 1.0)


def test_a_hard_negative_and_a_wrong_answer_by_hand() -> None:
    queries, documents = jnp.array([[1.0, 0.0]]), jnp.array([[[0.6, 0.8], [0.8, 0.6], [0.0, 0.0]]])
    loss, metrics = compiled(queries, documents, make_batch(["a"], [["A", "x", None]]), 0.1)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)
    assert (float(metrics["accuracy"]), float(metrics["negatives"])) == (0.0, 1.0)


def test_the_lowest_temperature_overflows_nowhere() -> None:
    queries, documents = jnp.eye(2), jnp.array([[[0.0, 1.0]], [[1.0, 0.0]]])  # every answer is the worst one
    loss = compiled(queries, documents, make_batch(["a", "b"], [["A"], ["B"]]), 0.001)[0]
    assert float(loss) == pytest.approx(1000.0)


def test_a_query_without_negatives_has_neither_loss_nor_gradient() -> None:
    queries, documents = jnp.eye(2), jnp.eye(2)[:, None]
    batch = make_batch(["a", "b"], [["A"], ["B"]], in_batch=[False, False])
    loss, grads = jax.value_and_grad(lambda q, d: compiled(q, d, batch, 0.1)[0], argnums=(0, 1))(queries, documents)
    assert float(loss) == 0.0
    assert not any(np.asarray(grad).any() for grad in grads)


WORDS = list("abcdefgh")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """Few words, so that queries and documents repeat."""
    b, m = draw(st.sampled_from([(1, 3), (4, 1), (4, 3)]))
    word = st.sampled_from(WORDS)
    queries = [draw(word) for _ in range(b)]
    documents = [[draw(word), *[draw(st.none() | word) for _ in range(m - 1)]] for _ in range(b)]
    positives = [[row[0], *draw(st.lists(word, max_size=2))] for row in documents]
    return queries, documents, [draw(st.booleans()) for _ in range(b)], positives, draw(st.integers(0, 1000))


def loop(q: np.ndarray, d: np.ndarray, case: tuple[Any, ...], temperature: float) -> tuple[float, float]:
    """The mean loss and the mean number of negatives, one pair of texts at a time."""
    queries, documents, in_batch, positives, _ = case
    losses, met = [], 0
    for i in range(len(queries)):
        total = math.exp(q[i] @ d[i, 0] / temperature)
        for j, row in enumerate(documents):
            for m, text in enumerate(row):
                own, shared = i == j and m > 0, i != j and in_batch[i] and in_batch[j] and queries[i] != queries[j]
                if text is not None and text not in positives[i] and (own or shared):
                    total += math.exp(q[i] @ d[j, m] / temperature)
                    met += 1
        losses.append(-math.log(math.exp(q[i] @ d[i, 0] / temperature) / total))
    return sum(losses) / len(losses), met / len(losses)


@given(cases())
def test_any_batch_has_the_loss_of_a_plain_loop(case: tuple[Any, ...]) -> None:
    queries, documents, in_batch, positives, seed = case
    random = np.random.default_rng(seed)
    q, d = draw_unit_vectors(random, len(queries), 6), draw_unit_vectors(random, len(queries), len(documents[0]), 6)
    loss, metrics = compiled(jnp.array(q), jnp.array(d), make_batch(queries, documents, in_batch, positives), 0.2)
    expected, met = loop(q, d, case, 0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(metrics["negatives"]) == pytest.approx(met)


DOCUMENTS: TextRows = [["A", "x", None], ["B", "A", "y"], ["C", "z", "z2"], ["D", None, None]]
MIXED = make_batch(list("abca"), DOCUMENTS, in_batch=[True, False, True, True], positives=[["A"], ["B"], ["C", "x"], ["D"]])


def test_gradients_are_those_of_finite_differences() -> None:
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, d = jnp.array(draw_unit_vectors(random, 4, 6)), jnp.array(draw_unit_vectors(random, 4, 3, 6))

        def loss(q: jax.Array, d: jax.Array) -> jax.Array:
            return compiled(q, d, MIXED, 0.1)[0]

        assert loss(q, d).dtype == jnp.float64
        gradient = jax.grad(loss, argnums=(0, 1))(q, d)
        for _ in range(5):
            way, step = (random.normal(size=q.shape), random.normal(size=d.shape)), 1e-6
            ahead, behind = (loss(q + s * way[0], d + s * way[1]) for s in (step, -step))
            along = sum(float((g * w).sum()) for g, w in zip(gradient, way, strict=True))
            assert float(ahead - behind) / (2 * step) == pytest.approx(along, rel=1e-6)
            assert abs(along) > 1e-3


def test_no_gradient_crosses_where_documents_are_not_lent() -> None:
    random = np.random.default_rng(0)
    q, d = jnp.array(draw_unit_vectors(random, 4, 6)), jnp.array(draw_unit_vectors(random, 4, 3, 6))
    of_query = jax.grad(lambda q, d: compiled(q, d, MIXED, 0.1)[0])
    crossing = np.abs(jax.jacobian(of_query, argnums=1)(q, d)).sum(axis=(1, 4))  # [query, owner, document]
    mixes = crossing.sum(axis=2) > 0
    # The second query's source has no in-batch negatives; the first and the last query are equal.
    assert mixes.astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]
    assert crossing[0, 0, 2] == 0.0  # absent
    assert crossing[2, 0, 1] == 0.0  # "x" is a positive of the third query
    assert crossing[2, 0, 0] > 0


def test_absent_slots_have_zero_vectors_and_zero_gradients() -> None:
    vectors = jnp.array(np.random.default_rng(0).normal(size=(4, 2, 6)))
    slots = jnp.array([[0, -1], [3, 1], [-1, -1], [2, 0]])

    def total(vectors: jax.Array) -> jax.Array:
        return jnp.sum(pick(vectors, slots, shards=2) * jnp.arange(1.0, 7))

    picked = pick(vectors, slots, shards=2)
    flat = vectors.reshape(8, 6)
    expected = [flat[0], None, flat[3], flat[1], None, None, flat[6], flat[4]]
    for got, want in zip(picked.reshape(8, 6), expected, strict=True):
        assert np.abs(got - (0.0 if want is None else want / jnp.linalg.norm(want))).max() < 1e-6
    gradient = np.asarray(jax.jit(jax.grad(total))(vectors)).reshape(8, 6)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).sum(axis=1) > 0).tolist() == [True, True, False, True, True, False, True, False]


def test_texts_of_padding_give_zero_gradients_and_no_nan() -> None:
    vectors = jnp.array(np.random.default_rng(0).normal(size=(1, 8, 6))).at[:, 6:].set(0.0)
    batch = make_batch(["a", "b"], [["A", "x"], ["B", None]]).replace(
        query_slot=jnp.array([0, 1]), doc_slot=jnp.array([[2, 3], [4, -1]])
    )

    def loss(vectors: jax.Array) -> jax.Array:
        unit_vectors = unit_length(vectors)
        queries, documents = pick(unit_vectors, batch.query_slot, 1), pick(unit_vectors, batch.doc_slot, 1)
        return compiled(queries, documents, batch, 0.1)[0]

    gradient = np.asarray(jax.jit(jax.grad(loss))(vectors))[0]
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).sum(axis=1) > 0).tolist() == [True] * 5 + [False] * 3


def test_unit_length_keeps_zero_and_direction() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]])
    assert np.allclose(unit_length(x), [[0.6, 0.8], [0, 0], [1, 0]])
    assert np.isfinite(jax.grad(lambda x: unit_length(x).sum())(x)).all()
