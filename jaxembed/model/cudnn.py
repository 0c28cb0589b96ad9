"""cuDNN's attention for NVIDIA GPUs: packed rows by the offsets of their texts, or by an explicit mask.

With offsets, cuDNN computes each text separately, without an array [T, T]. JAX has no public function for that, so the module
calls the one behind `jax.nn.dot_product_attention`. Before cuDNN is used on a GPU, it is compared with `attend_einsum` once,
on a small input: drivers, libraries and GPUs differ in what they support.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxembed.data.packing import compute_max_segments
from jaxembed.model.masks import BIDIRECTIONAL, CAUSAL, Mask, TokenInfo, materialize_mask
from jaxembed.model.plain_attention import attend_einsum
from jaxembed.model.sharded_kernel import shard_kernel

MAX_CUDNN_HEAD_WIDTH = 128  # and a multiple of 8
# With offsets, cuDNN stores softmax statistics: a float32 for each token, head, and text that a row has room for. Above this
# number of bytes for a token, a mask takes less memory.
MAX_STATISTICS_BYTES = 1 << 15
MAX_RELATIVE_ERROR = 0.02  # as norms, of cuDNN in bfloat16 against float32. That of einsum in bfloat16 is 0.004.
# The input of the comparison: rows, tokens, query heads, key-value heads.
CHECK_ROWS, CHECK_TOKENS, CHECK_HEADS, CHECK_KV_HEADS = 2, 128, 4, 2


def attend_cudnn(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
) -> Float[Array, "r t n h"]:
    """Compute `attend_einsum` with cuDNN."""
    if _is_packed(q, mask, window):
        attend = functools.partial(_attend_texts, is_causal=mask == CAUSAL)
        return shard_kernel("cudnn", attend, q.shape[0], k.shape[2])(q, k, v, token_info.segment)
    return attend_masked(q, k, v, token_info, mask, window)


def attend_masked(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: jax.Array | int | None,
) -> Float[Array, "r t n h"]:
    """Compute `attend_einsum` with cuDNN and the mask as an array [R, 1, T, T]."""
    seen = materialize_mask(mask, token_info, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="cudnn")


def attend_packed(
    q: Float[Array, "r t n h"],
    k: Float[Array, "r t g h"],
    v: Float[Array, "r t g h"],
    token_info: TokenInfo,
    mask: Mask,
    window: int | None = None,
) -> Float[Array, "r t n h"]:
    """Compute `attend_einsum` with cuDNN and the offsets of the texts, on one device and without a window."""
    assert window is None
    return _attend_texts(q, k, v, token_info.segment, is_causal=mask == CAUSAL)


def describe_cudnn_limit(q: Float[Array, "r t n h"], mask: Mask, window: jax.Array | int | None) -> str:
    """Return a phrase for the feature of this attention that cuDNN does not support, or an empty string."""
    tokens, width = q.shape[1], q.shape[3]
    if q.dtype.itemsize != 2:
        return f"{q.dtype.name} values"
    if width > MAX_CUDNN_HEAD_WIDTH or width % 8:
        return f"heads {width} wide (up to {MAX_CUDNN_HEAD_WIDTH}, in steps of 8)"
    if _is_packed(q, mask, window):
        return ""
    if tokens % 2:
        return "rows of an odd number of tokens"
    fault = find_fault(attend_masked, CAUSAL, width)
    return f"this GPU ({fault})" if fault else ""


def _is_packed(q: jax.Array, mask: Mask, window: jax.Array | int | None) -> bool:
    """Return whether attention uses the offsets of the texts. Otherwise it uses an explicit mask."""
    tokens, heads, width = q.shape[1:]
    is_plain = mask in (CAUSAL, BIDIRECTIONAL) and (window is None or (isinstance(window, int) and window >= tokens))
    is_small = 4 * heads * (compute_max_segments(tokens) + 1) <= MAX_STATISTICS_BYTES
    return is_plain and is_small and not find_fault(attend_packed, mask, width)


def _attend_texts(
    q: Float[Array, "r t n h"], k: Float[Array, "r t g h"], v: Float[Array, "r t g h"], segment: Int[Array, "r t"],
    *, is_causal: bool,
) -> Float[Array, "r t n h"]:  # fmt: skip
    """Attend inside each text of one device's rows, and among the padding of a row as if it were a text.

    cuDNN leaves the outputs of tokens that belong to no text uninitialized.
    """
    from jax._src.cudnn import fused_attention_stablehlo as library

    offsets, lengths = find_texts(segment)
    # JAX up to 0.11 computes the offsets of keys with the number of query heads (jax#39521), so both have the same number.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return library.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets, scale=q.shape[3] ** -0.5,
        mask_type=library.MaskType.CAUSAL if is_causal else library.MaskType.NO_MASK,
    )  # fmt: skip


def find_texts(segment: Int[Array, "r t"]) -> tuple[Int[Array, "r m1"], Int[Array, "r m"]]:
    """Return the first token of each text of a row, with one more column, and the length of each text, both filled with -1.

    Padding at the end of a row counts as a text.
    """
    tokens = segment.shape[1]
    texts = compute_max_segments(tokens) + 1
    is_first = jnp.diff(segment, axis=1, prepend=-1) != 0
    find = functools.partial(jnp.nonzero, size=texts + 1, fill_value=tokens)
    starts = jax.vmap(lambda row: find(row)[0])(is_first).astype(jnp.int32)
    lengths = starts[:, 1:] - starts[:, :-1]
    return jnp.where(starts < tokens, starts, -1), jnp.where(lengths > 0, lengths, -1)


@functools.cache
def find_fault(attend: Callable[..., jax.Array], mask: Mask, width: int) -> str:
    """Run a variant of cuDNN's attention once on the local GPU, and return what is wrong with it, or an empty string.

    Programs that are compiled for GPUs elsewhere are not checked.

    Args:
        attend: `attend_packed` or `attend_masked`.
        mask: Mask of the comparison.
        width: Width of a head.
    """
    if jax.default_backend() != "gpu":
        return ""
    # Another thread, because this one may be tracing a program, or have a mesh.
    with ThreadPoolExecutor(1) as pool:
        try:
            error = pool.submit(lambda: measure_error(attend, draw_check_inputs(width), mask)).result()
        except Exception as problem:  # the libraries can fail in any way
            return (str(problem) or repr(problem)).splitlines()[0][:160]
    return "" if error <= MAX_RELATIVE_ERROR else f"its results differ by {error:.2g} from those of einsum"


def draw_check_inputs(
    width: int, rows: int = CHECK_ROWS, tokens: int = CHECK_TOKENS, heads: int = CHECK_HEADS, kv_heads: int = CHECK_KV_HEADS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, TokenInfo]:
    """Draw queries, keys, values and token information of rows of several texts. Every other row ends with padding."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((rows, tokens, n, width), np.float32) for n in (heads, kv_heads, kv_heads))
    segment = np.sort(random.integers(1, 2 + compute_max_segments(tokens) // 2, (rows, tokens)).astype(np.int32), axis=1)
    segment[::2, -tokens // 4 :] = 0
    is_first = np.diff(segment, axis=1, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(is_first, np.arange(tokens), 0), axis=1)
    position = (np.arange(tokens) - starts).astype(np.int32)
    return q, k, v, TokenInfo(segment, position, np.ones_like(segment, bool))


def measure_error(attend: Callable[..., jax.Array], inputs: Any, mask: Mask) -> float:
    """Return the largest relative error of the output and the three gradients in bfloat16, against einsum in float32.

    Errors are norms of differences over norms, for all tokens of texts.

    Args:
        attend: Attention kernel.
        inputs: Arrays of `draw_check_inputs`.
        mask: Mask of the attention.
    """
    *qkv, token_info = inputs
    is_text = np.asarray(token_info.segment > 0)[:, :, None, None]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(kernel: Callable[..., jax.Array], dtype: Any, qkv: Any, token_info: TokenInfo) -> Any:
        def total(*qkv: jax.Array) -> Any:
            out = kernel(*(x.astype(jnp.bfloat16).astype(dtype) for x in qkv), token_info, mask, None)
            out = jnp.where(is_text, out.astype(jnp.float32), 0)
            return jnp.sum(jnp.sin(out)), out  # sin gives every output another gradient, cos(out)

        grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
        return out, *grads

    with jax.default_matmul_precision("highest"):
        expected = run(attend_einsum, jnp.float32, qkv, token_info)
    actual = run(attend, jnp.bfloat16, qkv, token_info)
    pairs = zip(actual, expected, strict=True)
    errors = [np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)) for a, b in pairs]
    return float(max(errors)) if np.isfinite(errors).all() else float("inf")
