"""JAX's splash attention, a TPU kernel that never stores the scores, applied to packed rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from jaxembed.devices.mesh import get_target_platform
from jaxembed.model.masks import BIDIRECTIONAL, CAUSAL, Mask, TokenInfo
from jaxembed.model.remat import ATTENTION_OUTPUT
from jaxembed.model.sharded_kernel import shard_kernel

TPU_LANES = 128  # a block of tokens must be a multiple of this
# Tokens per block, in order of preference: the first size that divides a row is used.
BLOCK_SIZES = (4 * TPU_LANES, 3 * TPU_LANES, 2 * TPU_LANES, TPU_LANES)


def describe_splash_limit(q: Float[Array, "r t n h"], mask: Mask, window: object) -> str:
    """Return a phrase for the feature of this attention that splash does not support, or an empty string."""
    if mask not in (CAUSAL, BIDIRECTIONAL):
        return "a mask that treats instructions differently"
    return f"{q.dtype.name} values" if q.dtype.itemsize > 4 else ""


def attend_splash(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: int | None,
) -> Float[Array, "r t n h"]:
    """Compute the same as `attend_einsum`, except at padding tokens. On CPUs the kernel is interpreted, and slow."""
    attend = functools.partial(_attend_local, mask=mask, window=window, interpret=get_target_platform() == "cpu")
    return shard_kernel("splash", attend, q.shape[0], k.shape[2])(q, k, v, token_info.segment)


def _attend_local(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    segment: Int[Array, "r t"],
    *,
    mask: Mask,
    window: int | None,
    interpret: bool,
) -> Float[Array, "r t n h"]:
    """Attend on one device's own rows and heads.

    It takes more than six arguments because `mask`, `window` and `interpret` are constants of the kernel.
    """
    # Pad the rows to whole blocks and move heads before tokens: [R, N, T', H]. Segment 0 marks the new tokens as padding.
    tokens, heads, width = q.shape[1:]
    padding = -tokens % TPU_LANES
    q, k, v = (jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)]).swapaxes(1, 2) for x in (q * width**-0.5, k, v))
    segment = jnp.pad(segment, [(0, 0), (0, padding)])
    # Build the kernel with the static mask of a row with one text. The segment ids separate the texts of a row.
    kernel = library.make_splash_mha(
        masks.MultiHeadMask([_make_static_mask(mask, window, tokens + padding)] * heads),
        block_sizes=_choose_blocks(tokens + padding),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION_OUTPUT,
    )

    def attend_row(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=library.SegmentIds(segment, segment))

    # Back to [R, T, N, H], without the padding.
    return jax.vmap(attend_row)(q, k, v, segment).swapaxes(1, 2)[:, :tokens]


def _make_static_mask(mask: Mask, window: int | None, tokens: int) -> masks.Mask:
    """Return the library's mask of a row with one text; windows are counted as in `Mask.allows`."""
    shape = (tokens, tokens)
    if window is None or window >= tokens:
        return masks.CausalMask(shape) if mask == CAUSAL else masks.FullMask(shape)
    return masks.LocalMask(shape, (window - 1, 0) if mask == CAUSAL else (window, window), offset=0)


def _choose_blocks(tokens: int) -> library.BlockSizes:
    """Return equal blocks of queries and keys for the forward pass and both backward passes."""
    block = next(size for size in BLOCK_SIZES if tokens % size == 0)
    return library.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
