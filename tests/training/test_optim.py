"""Learning-rate schedules, weight decay and clipping."""

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
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.model.embedder import EmbeddingModel, infer_parameter_shapes
from jaxembed.model.presets import find_preset
from jaxembed.training.optim import make_decay_mask, make_optimizer, make_schedule


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
def test_learning_rates_of_given_steps(options: dict[str, Any], expected: dict[int, float]) -> None:
    rate = make_schedule(OptimConfig(learning_rate=2.0, **options), steps=100)
    for step, fraction in expected.items():
        assert float(rate(step)) == pytest.approx(2.0 * fraction, abs=1e-6), step


def test_norms_and_biases_do_not_decay() -> None:
    model = EmbeddingModel(parse_hf_config(find_preset("qwen2-0.5b"), "test"), EmbeddingSpec())
    mask = make_decay_mask(nn.unbox(infer_parameter_shapes(model)))
    decays: dict[str, set[bool]] = {}
    for path, is_decayed in jax.tree.leaves_with_path(mask):
        decays.setdefault(path[-1].key, set()).add(is_decayed)
    assert decays == {"kernel": {True}, "embedding": {True}, "bias": {False}, "scale": {False}}


def test_a_parameter_without_a_decay_rule_raises() -> None:
    with pytest.raises(ValueError, match=r"no rule for parameter \['pooling'\]\['gain'\]"):
        make_decay_mask({"a": {"kernel": 1}, "pooling": {"gain": 1}})
    with pytest.raises(ValueError, match="matches no parameter"):
        make_decay_mask({"a": {"bias": 1, "scale": 1}})


PARAMS = {"kernel": jnp.full((2, 3), 2.0), "scale": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)}


def update_once(config: OptimConfig, grads: Any) -> tuple[Any, Any]:
    """Return the parameters and the optimizer state after one step."""
    optimizer = make_optimizer(config, steps=10)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates), state


def test_weights_decay_by_learning_rate_times_decay() -> None:
    config = OptimConfig(learning_rate=0.5, weight_decay=0.1)
    params, _ = update_once(config, jax.tree.map(jnp.zeros_like, PARAMS))
    assert np.allclose(params["kernel"], 2.0 * (1 - 0.05))
    assert np.array_equal(params["scale"], PARAMS["scale"])
    assert np.array_equal(params["bias"], PARAMS["bias"])


@pytest.mark.parametrize(("norm", "clipped_norm"), [(100.0, 1.5), (1.0, 1.0)])
def test_the_global_norm_is_clipped(norm: float, clipped_norm: float) -> None:
    count = sum(x.size for x in jax.tree.leaves(PARAMS))
    grads = jax.tree.map(lambda x: np.full(x.shape, norm / count**0.5, x.dtype), PARAMS)
    _, state = update_once(OptimConfig(clip=1.5), grads)
    momentum = optax.tree_utils.tree_get(state, "mu")  # after one step: a tenth of the gradient
    assert float(optax.global_norm(momentum)) == pytest.approx(0.1 * clipped_norm, rel=1e-5)
