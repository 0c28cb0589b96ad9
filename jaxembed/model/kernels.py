"""Attention of queries, keys and values over packed rows, in four ways that compute the same. A mask is a value.

`einsum` holds the scores of all rows at once. `rows` goes row by row and recomputes the scores in the backward pass, which
on CPUs is faster and takes an eighth of the memory. `splash` and `cudnn` are the kernels of TPUs and of NVIDIA's GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.devices.mesh import target_platform
from jaxembed.errors import UserError
from jaxembed.model import splash
from jaxembed.model.layers import at_least_float32
from jaxembed.model.masks import Mask, TokenInfo, visible

log = logging.getLogger("jaxembed")

# A group of rows whose scores fill about this many numbers is computed at once by the `rows` kernel.
SCORES_AT_ONCE = 1 << 21


def attend(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    places: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
) -> Float[Array, "r t n h"]:
    """softmax(q k / sqrt(H)) v among the tokens that the mask and the segments let each other see."""
    rows, tokens, heads, width = q.shape
    q_RTGMH = q.reshape(rows, tokens, k.shape[2], -1, width)
    scores = at_least_float32(jnp.einsum("rtgmh,rsgh->rgtms", q_RTGMH, k)) * width**-0.5
    seen = visible(mask, places, window)[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
    # In this order of operands the weights are multiplied as they lie, instead of their transpose: a fifth less time on CPUs
    return jnp.einsum("rsgh,rgtms->rtgmh", v, weights.astype(q.dtype)).reshape(rows, tokens, heads, width)


def attend_by_rows(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    places: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
    shards: int,
) -> Float[Array, "r t n h"]:
    """`attend`, some rows at a time. Rows are shard-major: each step takes rows of every shard, so all devices work."""
    rows, tokens, heads, _ = q.shape

    def by_turn(x: jax.Array) -> jax.Array:
        return x.reshape(shards, rows // shards, *x.shape[1:]).swapaxes(0, 1)

    def step(xs: tuple[jax.Array, jax.Array, jax.Array, TokenInfo]) -> jax.Array:
        return attend(*xs, mask, window)

    at_once = min(max(1, SCORES_AT_ONCE // (heads * tokens * tokens)), rows // shards)
    turns = jax.tree.map(by_turn, (q, k, v, places))
    out = jax.lax.map(jax.checkpoint(step), turns, batch_size=at_once)
    return out.swapaxes(0, 1).reshape(q.shape)


def attend_by_cudnn(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    places: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
) -> Float[Array, "r t n h"]:
    """`attend` by cuDNN, which is given who sees whom as an array [R, 1, T, T]: it knows no packed rows."""
    seen = visible(mask, places, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="cudnn")


def cudnn_refusal(q: Float[Array, "r t n h"], mask: Mask, window: jax.Array | int | None) -> str:
    """What of this attention cuDNN cannot compute; empty if it can."""
    tokens, width = q.shape[1], q.shape[3]
    if q.dtype.itemsize != 2:
        return f"{q.dtype.name} numbers"
    if width > 128 or width % 8:
        return f"heads {width} wide (only to 128, in steps of 8)"
    return "rows of an odd number of tokens" if tokens % 2 else ""


@dataclasses.dataclass(frozen=True)
class _OfPlatforms:
    """A kernel that runs on some platforms; `refusal(q, mask, window)` says what it cannot compute."""

    platforms: tuple[str, ...]
    attend: Callable[..., jax.Array]
    refusal: Callable[..., str]


KERNELS = {
    "splash": _OfPlatforms(("tpu", "cpu"), splash.attend, splash.refusal),
    "cudnn": _OfPlatforms(("gpu",), attend_by_cudnn, cudnn_refusal),
}
# What auto takes; einsum elsewhere.
FASTEST = {"cpu": "rows", "tpu": "splash"}


def pick_kernel(name: str, shards: int) -> Callable[..., jax.Array]:
    """The function of a config's `attention_kernel`, called as `attend` is. `UserError` where it does not run here.

    What it cannot compute is left to `attend`, and one line of the log says so.
    """
    platform = target_platform()
    name = FASTEST.get(platform, "einsum") if name == "auto" else name
    if name == "einsum":
        return attend
    if name == "rows":
        return functools.partial(attend_by_rows, shards=shards)
    kernel = KERNELS[name]
    if platform not in kernel.platforms:
        told = f"model.attention_kernel is {name}, which runs on {' and '.join(kernel.platforms)}, and this is {platform}"
        raise UserError(f"{told}; choose auto, einsum or rows")

    def or_einsum(
        q: jax.Array, k: jax.Array, v: jax.Array, places: TokenInfo, mask: Mask, window: jax.Array | int | None
    ) -> jax.Array:
        refused = kernel.refusal(q, mask, window)
        if refused:
            _warn_once(f"attention kernel {name} does not compute {refused}: einsum does")
        return (attend if refused else kernel.attend)(q, k, v, places, mask, window)

    return or_einsum


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
