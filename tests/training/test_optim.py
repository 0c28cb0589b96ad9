"""Learning rates, weight decay and clipping."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxembed.config import OptimConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.model.embedder import EmbeddingModel, parameter_shapes
from jaxembed.model.families import from_hf, preset
from jaxembed.training.optim import decay_mask, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "linear"}, {0: 1.0, 25: 0.75, 50: 0.5, 99: 0.01, 100: 0.0}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 75: 0.146447, 100: 0.0}),
        ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 100: 1.0}),
        ({"schedule": "linear", "warmup_steps": 20}, {0: 0.05, 9: 0.5, 18: 0.95, 19: 1.0, 20: 1.0, 60: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "warmup_steps": 20}, {0: 0.05, 19: 1.0, 60: 0.5, 100: 0.0}),
        ({"schedule": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 100: 1.0}),
        ({"schedule": "linear", "warmup_steps": 1}, {0: 1.0, 1: 1.0, 100: 0.0}),
        ({"schedule": "linear", "warmup_steps": 200}, {0: 0.005, 99: 0.5}),
    ],
)
def test_rates_of_given_steps(options: dict[str, Any], expected: dict[int, float]) -> None:
    rate = learning_rate(OptimConfig(learning_rate=2.0, **options), steps=100)
    for step, share in expected.items():
        assert float(rate(step)) == pytest.approx(2.0 * share, abs=1e-6), step


def test_decay_spares_norms_and_biases() -> None:
    model = EmbeddingModel(from_hf(preset("qwen2-0.5b"), "test"), EmbeddingSpec())
    mask = decay_mask(nn.unbox(parameter_shapes(model)))
    by_kind: dict[str, set[bool]] = {}
    for path, decayed in jax.tree.leaves_with_path(mask):
        by_kind.setdefault(path[-1].key, set()).add(decayed)
    assert by_kind == {"kernel": {True}, "embedding": {True}, "bias": {False}, "scale": {False}}


def test_a_parameter_that_the_rule_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no rule for parameter \['pooling'\]\['gain'\]"):
        decay_mask({"a": {"kernel": 1}, "pooling": {"gain": 1}})
    with pytest.raises(ValueError, match="matches no parameter"):
        decay_mask({"a": {"bias": 1, "scale": 1}})


PARAMS = {"kernel": jnp.full((2, 3), 2.0), "scale": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)}


def updated(config: OptimConfig, grads: Any) -> tuple[Any, Any]:
    """The parameters and the optimizer's state after one step."""
    optimizer = make_optimizer(config, steps=10)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates), state


def test_weights_decay_by_rate_times_decay() -> None:
    config = OptimConfig(learning_rate=0.5, weight_decay=0.1)
    params, _ = updated(config, jax.tree.map(jnp.zeros_like, PARAMS))
    assert np.allclose(params["kernel"], 2.0 * (1 - 0.05))
    assert np.array_equal(params["scale"], PARAMS["scale"])
    assert np.array_equal(params["bias"], PARAMS["bias"])


@pytest.mark.parametrize(("size", "after"), [(100.0, 1.5), (1.0, 1.0)])
def test_the_global_norm_is_clipped(size: float, after: float) -> None:
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    grads = jax.tree.map(lambda g: g * size / optax.global_norm(grads), grads)
    _, state = updated(OptimConfig(clip=1.5), grads)
    momentum = optax.tree_utils.tree_get(state, "mu")  # after one step, a tenth of the gradient
    assert float(optax.global_norm(momentum)) == pytest.approx(0.1 * after, rel=1e-5)
