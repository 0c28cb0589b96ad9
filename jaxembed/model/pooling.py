"""From hidden states of packed rows to one vector a text. A pooling is a module; POOLINGS names them for configs."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxembed.model.layers import at_least_float32


def segment_mask(segment_ids: Int[Array, "r t"], pool_mask: Bool[Array, "r t"], segments: int) -> Bool[Array, "r t s"]:
    """[R, T, S]: which tokens are pooled into which text of the row."""
    return (segment_ids[..., None] == jnp.arange(1, segments + 1)) & pool_mask[..., None]


class MeanPooling(nn.Module):
    """Mean over a text's pooled tokens; zeros for a text that is not there."""

    @nn.compact
    def __call__(self, hidden: Float[Array, "r t d"], members: Bool[Array, "r t s"]) -> Float[Array, "r s d"]:
        wide = at_least_float32(hidden)
        total = jnp.einsum("rts,rtd->rsd", members.astype(wide.dtype), wide, precision=jax.lax.Precision.HIGHEST)
        return total / jnp.maximum(members.sum(axis=1), 1)[..., None]


class LastPooling(nn.Module):
    """The last pooled token, which is EOS where the tokenizer appends it; zeros for a text that is not there."""

    @nn.compact
    def __call__(self, hidden: Float[Array, "r t d"], members: Bool[Array, "r t s"]) -> Float[Array, "r s d"]:
        last = jnp.max(jnp.where(members, jnp.arange(members.shape[1])[:, None], -1), axis=1)
        picked = jnp.take_along_axis(at_least_float32(hidden), jnp.maximum(last, 0)[..., None], axis=1)
        return jnp.where(last[..., None] >= 0, picked, 0.0)


POOLINGS: dict[str, Callable[[], nn.Module]] = {"mean": MeanPooling, "last": LastPooling}


def unit_length(x: Float[Array, "*b d"], floor: float = 1e-12) -> Float[Array, "*b d"]:
    """x / |x|; zero stays zero, with a zero gradient (a plain norm would give NaN there)."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, floor**2))
