"""Objectives at early exits, and the alignment of exits with the whole model (2DMSE, Li et al. 2024, arXiv:2402.14776)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.config import ExitsConfig
from jaxembed.errors import UserError


def check_exits(config: ExitsConfig, layers: int, prefix: str = "") -> None:
    """Check that a model with this number of layers has the exits.

    Raises:
        UserError: It does not have them. The message starts with `prefix`, the key prefix of the stage.
    """
    if (deepest := max(config.layers, default=0)) >= layers:
        raise UserError(f"{prefix}exits.layers contains {deepest} (expected less than {layers}, the layers of this model)")
    if config.random >= layers:
        raise UserError(f"{prefix}exits.random is {config.random} (expected less than {layers}, the layers of this model)")


def draw_exit_layers(config: ExitsConfig, layers: int, key: jax.Array) -> Int[Array, " e"] | None:
    """Return the number of layers before each exit: the fixed ones, then different random ones from 1 to `layers` - 1.

    None without exits.
    """
    if not config.all_weights:
        return None
    random_layers = 1 + jax.random.choice(key, layers - 1, (config.random,), replace=False)
    return jnp.concatenate([jnp.array(config.layers, jnp.int32), random_layers.astype(jnp.int32)])


def align_exits(vectors: Float[Array, "b m x d"], is_present: jax.Array, temperature: float) -> Float[Array, " e"]:
    """Return KL(whole model || exit), averaged over the texts, for each of E exits.

    The distributions are softmaxes over the D components of a vector divided by a temperature (equation 11 of the survey
    arXiv:2406.01607). That of the whole model is a target without gradient, as in sentence-transformers.

    Args:
        vectors: Unit vectors of the texts, from the whole model first, then from the exits.
        is_present: True for texts that are present, [B, M].
        temperature: Temperature of the softmaxes.
    """
    log_p = jax.nn.log_softmax(vectors / temperature, axis=-1)
    target = jax.lax.stop_gradient(log_p[:, :, :1])
    kl = jnp.sum(jnp.exp(target) * (target - log_p[:, :, 1:]), axis=-1)
    return jnp.sum(jnp.where(is_present[..., None], kl, 0), axis=(0, 1)) / is_present.sum()
