"""The loss of predicted tokens against PyTorch and constants, in groups, over blocks of the vocabulary."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from jaxembed.config import CausalLMConfig, MaskedPredictionConfig
from jaxembed.data.token_batch import TokenBatch, round_up_predictions
from jaxembed.losses.token_prediction import cross_entropy, kl_divergence, token_prediction_loss

SHARDS, PREDICTIONS, WIDTH, VOCABULARY = 2, 10, 8, 37


@pytest.fixture(params=[1 << 24, 60])  # a single block, and seven
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxembed.losses.token_prediction.MAX_LOGITS_PER_BLOCK", request.param)


def draw_arrays() -> tuple[jax.Array, jax.Array, TokenBatch]:
    """Draw hidden states, a table, and predictions of 6 texts in 2 shards. The last two are padding."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(SHARDS, PREDICTIONS, WIDTH)).astype(np.float32)
    table = random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    text = np.tile([0, 0, 0, 0, 1, 1, 2, 2, 0, 0], (SHARDS, 1)).astype(np.int32)
    weight = np.tile([1.0] * 8 + [0.0] * 2, (SHARDS, 1)).astype(np.float32)
    target = random.integers(VOCABULARY, size=text.shape).astype(np.int32)
    size = np.array([4, 2, 2] * SHARDS, np.float32)
    texts: object = None  # the loss does not read the texts
    arrays = jax.tree.map(jnp.asarray, (hidden, table))
    arrays_of_texts = map(jnp.asarray, (np.zeros_like(text), target, weight, text, size))
    batch = TokenBatch(texts, *arrays_of_texts)  # type: ignore[arg-type]
    return *arrays, batch


def torch_loss(hidden: torch.Tensor, table: torch.Tensor, batch: TokenBatch, group: int) -> torch.Tensor:
    """Return the mean over groups of texts of the mean cross-entropy of their predictions."""
    losses = torch.nn.functional.cross_entropy(
        (hidden @ table.T).reshape(-1, VOCABULARY), torch.tensor(np.array(batch.target)).reshape(-1).long(), reduction="none"
    )
    text = (batch.text + 3 * np.arange(SHARDS)[:, None]).ravel()
    means = [
        losses[torch.tensor(np.array((text // group == g) & (batch.weight.ravel() > 0)))].mean() for g in range(6 // group)
    ]
    return torch.stack(means).mean()


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_loss_and_gradients_are_those_of_pytorch(group: int, blocks: None) -> None:
    hidden, table, batch = draw_arrays()
    config = MaskedPredictionConfig(group=None if group == 6 else group)
    loss, grads = jax.value_and_grad(lambda h, t: token_prediction_loss(config, h, t, batch), (0, 1))(hidden, table)
    tensors = [torch.tensor(np.array(x), requires_grad=True) for x in (hidden, table)]
    expected = torch_loss(*tensors, batch, group)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for grad, tensor in zip(grads, tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(grad, tensor.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("config", [MaskedPredictionConfig(), CausalLMConfig()])
def test_a_loss_computed_by_hand(config: MaskedPredictionConfig | CausalLMConfig) -> None:
    """Logits (ln 3, 0) and (0, ln 7): the targets have probabilities 3/4 and 1/8. The second has the weight of rate 1/2."""
    hidden, table = jnp.array([[[math.log(3), 0.0], [0.0, math.log(7)]]]), jnp.eye(2)
    batch = draw_arrays()[2].replace(
        target=jnp.array([[0, 0]]), weight=jnp.array([[1.0, 2.0]]), text=jnp.array([[0, 1]]), size=jnp.array([4.0, 4.0])
    )
    quarter, half = math.log(4 / 3) / 4, 2 * math.log(8) / 4
    loss = token_prediction_loss(config, hidden, table, batch)
    assert float(loss) == pytest.approx((quarter + half) / 2)
    by_text = token_prediction_loss(config.replace(group=1), hidden, table, batch.replace(size=jnp.array([4.0, 0.0])))
    assert float(by_text) == pytest.approx(quarter)  # the second group has no size, so it does not count


def test_a_kl_divergence_computed_by_hand() -> None:
    """From the distribution (3/4, 1/4) to (1/8, 7/8), and to itself."""
    states = jnp.array([[[math.log(3), 0.0], [0.0, math.log(7)]]])
    divergences = kl_divergence(states[:, [0, 0]], states[:, [1, 0]], jnp.eye(2))
    assert divergences[0].tolist() == pytest.approx([0.75 * math.log(6) - 0.25 * math.log(3.5), 0], abs=1e-6)


def test_kl_divergence_is_that_of_pytorch(blocks: None) -> None:
    hidden, table, _ = draw_arrays()
    reference = 0.5 * hidden[:, ::-1]
    total, grads = jax.value_and_grad(lambda r, h, t: kl_divergence(r, h, t).sum(), (0, 1, 2))(reference, hidden, table)
    ours, theirs, kernel = (torch.tensor(np.array(x), requires_grad=True) for x in (hidden, reference, table))
    logits = [torch.log_softmax(states @ kernel.T.detach(), dim=-1) for states in (ours, theirs)]
    expected = torch.nn.functional.kl_div(logits[0], logits[1].detach(), reduction="sum", log_target=True)
    expected.backward()
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours.grad is not None
    np.testing.assert_allclose(grads[1], ours.grad, rtol=2e-4, atol=2e-5)
    assert not grads[0].any() and not grads[2].any()
    np.testing.assert_allclose(kl_divergence(hidden, hidden, table), 0, atol=1e-5)


def test_gradients_are_those_of_finite_differences(blocks: None) -> None:
    hidden, table, batch = draw_arrays()

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return token_prediction_loss(CausalLMConfig(group=2), jnp.asarray(hidden), jnp.asarray(table), batch)

    def divergence(states: jax.Array) -> jax.Array:
        return kl_divergence(hidden[:, ::-1], jnp.asarray(states), table).mean()

    check = functools.partial(check_grads, order=1, modes=["rev"], eps=1e-2, atol=5e-3, rtol=5e-3)
    check(loss, (hidden, table))
    check(divergence, (hidden,))


def test_the_sums_are_float32_under_bfloat16(blocks: None) -> None:
    hidden, table, batch = draw_arrays()
    rounded = jnp.asarray(hidden, jnp.bfloat16)
    losses = cross_entropy(rounded, jnp.asarray(table), jnp.asarray(batch.target))
    exact = cross_entropy(rounded.astype(jnp.float32), jnp.asarray(table, jnp.bfloat16).astype(jnp.float32), batch.target)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, exact, rtol=1e-5, atol=1e-5)
    reference = rounded[:, ::-1]
    divergences = kl_divergence(reference, rounded, table)
    exact = kl_divergence(reference.astype(jnp.float32), rounded.astype(jnp.float32), table.astype(jnp.bfloat16))
    assert divergences.dtype == jnp.float32
    np.testing.assert_allclose(divergences, exact, rtol=1e-5, atol=1e-5)


def test_the_logits_of_a_large_vocabulary_are_never_all_in_memory() -> None:
    count, vocabulary = 4096, 151_936
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, count, 2), (vocabulary, 2))]
    targets = jax.ShapeDtypeStruct((1, count), jnp.int32)
    grad = jax.jit(jax.grad(lambda h, t, y: jnp.sum(cross_entropy(h, t, y)), (0, 1)))
    temporary = grad.lower(*shapes, targets).compile().memory_analysis().temp_size_in_bytes
    assert temporary < count * vocabulary * 4 / 5


def test_large_logits_do_not_overflow(blocks: None) -> None:
    hidden, table, batch = draw_arrays()
    assert np.isfinite(cross_entropy(1e4 * hidden, table, batch.target)).all()


def test_the_allowed_numbers_of_predictions() -> None:
    sizes = sorted({round_up_predictions(count) for count in range(100)})
    assert sizes == [4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112]
    assert all(round_up_predictions(size) == size for size in sizes)
