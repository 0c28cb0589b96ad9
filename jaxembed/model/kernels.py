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

from jaxembed.config.field_lists import log_once
from jaxembed.devices.mesh import get_target_platform
from jaxembed.errors import UserError
from jaxembed.model.cudnn import attend_cudnn, describe_cudnn_limit
from jaxembed.model.masks import Mask, TokenInfo
from jaxembed.model.plain_attention import AttentionDropout, attend_einsum, attend_rows
from jaxembed.model.splash import attend_splash, describe_splash_limit


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
DEFAULT_KERNELS = {"cpu": "rows", "gpu": "cudnn", "tpu": "splash"}


def resolve_kernel(name: str) -> str:
    """Return the kernel that a config's `attention_kernel` names on the target platform: `auto` depends on the platform."""
    return DEFAULT_KERNELS.get(get_target_platform(), "einsum") if name == "auto" else name


def pick_kernel(name: str, shards: int, windows: tuple[int, ...] = ()) -> Callable[..., jax.Array]:
    """Return the attention function of a config's `attention_kernel`, with the arguments of `attend_einsum`.

    If the kernel does not support the attention, the function falls back to `attend_einsum` and logs one warning.

    Args:
        name: auto, einsum, rows, splash or cudnn.
        shards: Number of equal parts into which the rows are split over devices.
        windows: The values that a window in an array can have.

    Raises:
        UserError: The kernel does not run on this platform.
    """
    platform, name = get_target_platform(), resolve_kernel(name)
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
            # One branch for each window. A layer runs the branch of its window.
            branches = [functools.partial(kernel.attend, mask=mask, window=value) for value in windows]
            return jax.lax.switch(jnp.argmax(jnp.array(windows) == window), branches, q, k, v, token_info)
        return kernel.attend(q, k, v, token_info, mask, window)

    return attend_or_fall_back


def pick_dropout_kernel(name: str, shards: int, rate: float, key: jax.Array) -> Callable[..., jax.Array]:
    """Return an attention function with dropout: `attend_rows` where `name` resolves to it, otherwise `attend_einsum`.

    The platform kernels do not support dropout. A warning is logged once.
    """
    resolved, dropout = resolve_kernel(name), AttentionDropout(rate, key)
    if resolved == "rows":
        return functools.partial(attend_rows, shards=shards, dropout=dropout)
    if resolved != "einsum":
        log_once(f"attention kernel {resolved} does not support dropout; einsum is used instead")
    return functools.partial(attend_einsum, dropout=dropout)
