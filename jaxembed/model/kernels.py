"""Attention over packed rows: four kernels that compute the same function of queries, keys and values.

- `einsum` stores the scores of all rows at once.
- `rows` loops over groups of rows and recomputes the scores in the backward pass. On CPUs it is faster than `einsum` and uses
  an eighth of the memory.
- `splash` is JAX's kernel for TPUs.
- `cudnn` is cuDNN's kernel for NVIDIA GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxembed.config.field_lists import log_once
from jaxembed.devices.mesh import target_platform
from jaxembed.errors import UserError
from jaxembed.model.layers import promote_to_float32
from jaxembed.model.masks import Mask, TokenInfo, materialize_mask
from jaxembed.model.splash import attend_splash, describe_splash_limit

# Scores that the `rows` kernel computes at once (8 MiB in float32). At least one row of each shard is computed.
MAX_SCORES_PER_GROUP = 1 << 21


def attend_einsum(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
) -> Float[Array, "r t n h"]:
    """Return softmax(q k^T / sqrt(H)) v over the tokens that a query sees, by its mask and its segment.

    Args:
        q: Queries. Head n reads the key-value head n // (N / G).
        k: Keys.
        v: Values.
        token_info: Segments and positions of the tokens, [R, T] each.
        mask: Which tokens of a text see each other.
        window: Sliding window of the layer in tokens, or None.
    """
    rows, tokens, heads, width = q.shape
    # Query heads that share a key-value head lie along a new axis M = N / G.
    q_RTGMH = q.reshape(rows, tokens, k.shape[2], -1, width)
    # Scores and softmax are in float32: in 16 bits, small differences between large scores would be lost.
    scores_RGTMS = promote_to_float32(jnp.einsum("rtgmh,rsgh->rgtms", q_RTGMH, k)) * width**-0.5
    seen = materialize_mask(mask, token_info, window)[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores_RGTMS, jnp.finfo(scores_RGTMS.dtype).min), axis=-1)
    # With the values first, the weights are multiplied in their own layout instead of transposed: a fifth faster on CPUs.
    return jnp.einsum("rsgh,rgtms->rtgmh", v, weights.astype(q.dtype)).reshape(rows, tokens, heads, width)


def attend_rows(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
    shards: int,
) -> Float[Array, "r t n h"]:
    """Compute `attend_einsum` for some rows at a time.

    It takes more than six arguments because it is called like the other kernels. `pick_kernel` binds `shards`, the number of
    equal, contiguous parts in which the rows are split over devices.
    """
    rows, tokens, heads, _ = q.shape

    # [R, ...] -> [R / shards, shards, ...]: each step takes rows of every shard, so that all devices work.
    def interleave_shards(x: jax.Array) -> jax.Array:
        return x.reshape(shards, rows // shards, *x.shape[1:]).swapaxes(0, 1)

    def attend(xs: tuple[jax.Array, jax.Array, jax.Array, TokenInfo]) -> jax.Array:
        return attend_einsum(*xs, mask, window)

    # `lax.map` loops over groups of steps. `checkpoint` recomputes a group's scores in the backward pass, so that only one
    # group's scores are in memory at a time.
    group_size = min(max(1, MAX_SCORES_PER_GROUP // (heads * tokens * tokens)), rows // shards)
    steps = jax.tree.map(interleave_shards, (q, k, v, token_info))
    out = jax.lax.map(jax.checkpoint(attend), steps, batch_size=group_size)
    return out.swapaxes(0, 1).reshape(q.shape)


def attend_cudnn(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
) -> Float[Array, "r t n h"]:
    """Compute `attend_einsum` with cuDNN. It does not support packed rows, so it gets the mask as an array [R, 1, T, T]."""
    seen = materialize_mask(mask, token_info, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="cudnn")


def describe_cudnn_limit(q: Float[Array, "r t n h"], mask: Mask, window: jax.Array | int | None) -> str:
    """Return a phrase for the feature of this attention that cuDNN does not support, or an empty string."""
    tokens, width = q.shape[1], q.shape[3]
    if q.dtype.itemsize != 2:
        return f"{q.dtype.name} numbers"
    if width > 128 or width % 8:
        return f"heads {width} wide (up to 128, in steps of 8)"
    return "rows of an odd number of tokens" if tokens % 2 else ""


@dataclasses.dataclass(frozen=True)
class PlatformKernel:
    """A kernel that runs on some platforms.

    Attributes:
        platforms: Platforms as JAX names them.
        attend: Function with the arguments of `attend_einsum`.
        describe_limit: Function (q, mask, window) that returns a phrase for what is not supported, or an empty string.
        needs_static_window: Whether the window must be a Python value. Layers with different ones then compile a kernel each.
    """

    platforms: tuple[str, ...]
    attend: Callable[..., jax.Array]
    describe_limit: Callable[..., str]
    needs_static_window: bool = False


PLATFORM_KERNELS = {
    "splash": PlatformKernel(("tpu", "cpu"), attend_splash, describe_splash_limit, needs_static_window=True),
    "cudnn": PlatformKernel(("gpu",), attend_cudnn, describe_cudnn_limit),
}
# The kernel that `auto` picks on each platform. On others it picks einsum.
DEFAULT_KERNELS = {"cpu": "rows", "tpu": "splash"}


def resolve_kernel(name: str) -> str:
    """Return the kernel that a config's `attention_kernel` names on the target platform: `auto` depends on the platform."""
    return DEFAULT_KERNELS.get(target_platform(), "einsum") if name == "auto" else name


def pick_kernel(name: str, shards: int, windows: tuple[int, ...] = ()) -> Callable[..., jax.Array]:
    """Return the attention function of a config's `attention_kernel`, with the arguments of `attend_einsum`.

    Where the kernel does not support the attention, the function falls back to `attend_einsum` and logs one warning.

    Args:
        name: auto, einsum, rows, splash or cudnn.
        shards: Number of equal parts in which the rows are split over devices.
        windows: The values that a window in an array can have.

    Raises:
        UserError: The kernel does not run on this platform.
    """
    platform, name = target_platform(), resolve_kernel(name)
    if name == "einsum":
        return attend_einsum
    if name == "rows":
        return functools.partial(attend_rows, shards=shards)
    kernel = PLATFORM_KERNELS[name]
    if platform not in kernel.platforms:
        raise UserError(
            f"model.attention_kernel: {name} does not run on this platform (found {platform}; expected "
            f"{' or '.join(kernel.platforms)}). Set it to auto, einsum or rows."
        )

    def attend_or_fall_back(
        q: jax.Array, k: jax.Array, v: jax.Array, token_info: TokenInfo, mask: Mask, window: jax.Array | int | None
    ) -> jax.Array:
        limit = kernel.describe_limit(q, mask, window)
        if limit:
            log_once(f"attention kernel {name} does not support {limit}; einsum is used instead")
            return attend_einsum(q, k, v, token_info, mask, window)
        if isinstance(window, jax.Array) and kernel.needs_static_window:
            # One kernel for each window, of which each layer runs its own.
            branches = [functools.partial(kernel.attend, mask=mask, window=value) for value in windows]
            return jax.lax.switch(jnp.argmax(jnp.array(windows) == window), branches, q, k, v, token_info)
        return kernel.attend(q, k, v, token_info, mask, window)

    return attend_or_fall_back
