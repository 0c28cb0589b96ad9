"""JAX's splash attention, a kernel for TPUs that never holds the scores: on packed rows, on every device of a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxembed.devices.collectives import auto_axes
from jaxembed.devices.mesh import BATCH_AXES, target_platform
from jaxembed.model.masks import BIDIRECTIONAL, CAUSAL, Mask, TokenInfo

LANES = 128  # a block of tokens is a multiple of a TPU's lanes
BLOCKS = (4 * LANES, 3 * LANES, 2 * LANES, LANES)  # tokens of a block: as many as divide the row


def refusal(q: Float[Array, "r t n h"], mask: Mask, window: jax.Array | int | None) -> str:
    """What of this attention splash cannot compute; empty if it can."""
    if mask not in (CAUSAL, BIDIRECTIONAL):
        return "a mask that treats instructions differently"
    if isinstance(window, jax.Array):
        return "windows that differ from layer to layer"
    return f"{q.dtype.name} numbers" if q.dtype.itemsize > 4 else ""


def attend(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    places: TokenInfo,
    mask: Mask,
    window: int | None,
) -> Float[Array, "r t n h"]:
    """Attention as `kernels.attend` gives it, except at padding. On CPUs the kernel is interpreted, which is slow."""
    function = functools.partial(_attend, mask=mask, window=window, interpret=target_platform() == "cpu")
    return _over_mesh(function, q.shape[0], k.shape[2])(q, k, v, places.segment)


def _attend(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    segment: Int[Array, "r t"],
    *,
    mask: Mask,
    window: int | None,
    interpret: bool,
) -> Float[Array, "r t n h"]:
    """The same of a device's own rows and heads, which are padded to whole blocks."""
    tokens, heads, width = q.shape[1:]
    more = -tokens % LANES
    q, k, v = (jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)]).swapaxes(1, 2) for x in (q * width**-0.5, k, v))
    segment = jnp.pad(segment, [(0, 0), (0, more)])
    kernel = library.make_splash_mha(
        masks.MultiHeadMask([_static_mask(mask, window, tokens + more)] * heads),
        block_sizes=_blocks(tokens + more),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=library.SegmentIds(segment, segment))

    return jax.vmap(of_row)(q, k, v, segment).swapaxes(1, 2)[:, :tokens]


def _static_mask(mask: Mask, window: int | None, tokens: int) -> masks.Mask:
    """Who sees whom in a row of one text: of texts that share a row, segments do the rest."""
    shape = (tokens, tokens)
    if window is None:
        return masks.CausalMask(shape) if mask == CAUSAL else masks.FullMask(shape)
    return masks.LocalMask(shape, (window - 1, 0) if mask == CAUSAL else (window, window), offset=0)


def _blocks(tokens: int) -> library.BlockSizes:
    """Blocks of queries and keys, the same in all three passes."""
    block = next(size for size in BLOCKS if tokens % size == 0)
    return library.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )


def _over_mesh(function: Callable[..., jax.Array], rows: int, kv_heads: int) -> Callable[..., jax.Array]:
    """`function(q, k, v, segment)` on each device's own rows and heads: no compiler splits a kernel.

    Of the mesh (`jax.set_mesh`) only the axes count that are not split by hand already. Rows go over the batch axes and
    heads over `tensor`, where they divide evenly; else every device takes all.
    """
    mesh, free = jax.sharding.get_abstract_mesh(), auto_axes()
    if not free:
        return function
    of_rows = tuple(axis for axis in BATCH_AXES if axis in free)
    if rows % math.prod(mesh.shape[axis] for axis in of_rows):
        of_rows = ()
    of_heads = "tensor" if "tensor" in free and kv_heads % mesh.shape["tensor"] == 0 else None
    split = PartitionSpec(of_rows, None, of_heads)
    specs = (split, split, split, PartitionSpec(of_rows))
    # The library's kernels do not say over which axes their results vary, so that cannot be checked.
    return jax.shard_map(function, in_specs=specs, out_specs=split, axis_names=set(free), check_vma=False)
