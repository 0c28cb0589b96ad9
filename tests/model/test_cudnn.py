"""cuDNN's attention without a GPU: what is given to it, against einsum, and its programs lowered for CUDA."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as library
from jax.sharding import Mesh

from jaxembed.model import cudnn, kernels
from jaxembed.model.cudnn import attend_masked, attend_packed, draw_check_inputs, find_fault, find_texts, measure_error
from jaxembed.model.kernels import pick_kernel
from jaxembed.model.masks import BIDIRECTIONAL, CAUSAL, MASKS
from jaxembed.model.plain_attention import attend_einsum

PACKED, MASKED = "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lower for a GPU: JAX asks cuDNN for its version and the GPU for its generation."""
    monkeypatch.setattr(kernels, "get_target_platform", lambda: "gpu")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    find_fault.cache_clear()
    yield
    find_fault.cache_clear()


def lower_text(mask: str, window: int | None, dtype: Any, tokens: int = 64, heads: int = 4) -> str:
    """Lower `auto` and its gradients for CUDA."""
    q, k, v, token_info = jax.device_put(draw_check_inputs(8, tokens=tokens, heads=heads, kv_heads=heads // 2))
    kernel = pick_kernel("auto", 1)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return kernel(*(x.astype(dtype) for x in (q, k, v)), token_info, MASKS[mask], window).astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return str(grad.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text())


def list_calls(text: str) -> set[str]:
    return set(re.findall(r"__cudnn\$\w+", text))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("mask", "window", "tokens", "heads", "name"),
    [
        ("causal", None, 64, 4, PACKED),
        ("bidirectional", 64, 64, 4, PACKED),
        ("causal", 5, 64, 4, MASKED),
        ("prefix", None, 64, 4, MASKED),
        ("causal", None, 2048, 32, MASKED),  # the statistics of the texts would need more memory
    ],
)
def test_cudnn_lowers_for_gpus(mask: str, window: int | None, tokens: int, heads: int, name: str) -> None:
    text = lower_text(mask, window, jnp.bfloat16, tokens, heads)
    assert list_calls(text) == {name, f"{name}Backward"}
    has_square = re.search(rf"tensor<[\dx]*{tokens}x{tokens}x(i1|bf16|f32)>", text) is not None
    assert has_square == (name == MASKED)


@pytest.mark.usefixtures("gpu")
def test_einsum_replaces_cudnn_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jaxembed"):
        assert not list_calls(lower_text("causal", None, jnp.float32))
        assert not list_calls(lower_text("prefix", None, jnp.bfloat16, tokens=65))
    warning = "attention kernel cudnn does not support {}; einsum is used instead"
    limits = ("float32 values", "rows of an odd number of tokens")
    assert [record.message for record in caplog.records] == [warning.format(limit) for limit in limits]


@pytest.mark.usefixtures("gpu")
def test_packed_cudnn_is_split_over_devices() -> None:
    """Each device calls cuDNN for its own rows and heads, without messages."""
    q, k, v, token_info = jax.device_put(draw_check_inputs(8, rows=4, tokens=64))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return pick_kernel("auto", 4)(*(x.astype(jnp.bfloat16) for x in (q, k, v)), token_info, CAUSAL, None)

    with jax.set_mesh(mesh):
        text = jax.jit(attend).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"__cudnn\$fmhaSoftmax.*tensor<1x64x2x8xbf16>", text)
    assert not re.search(r"all_gather|all_reduce|all_to_all", text)


def test_texts_are_found_by_their_first_tokens() -> None:
    segment = jnp.array([[1] * 9 + [2] * 3 + [0] * 4, [1] * 16])
    starts, lengths = find_texts(segment)
    assert starts.tolist() == [[0, 9, 12, -1], [0, -1, -1, -1]]
    assert lengths.tolist() == [[9, 3, 4], [16, -1, -1]]


def attend_by_offsets(q: Any, k: Any, v: Any, *, q_seqlen: Any, q_offsets: Any, scale: float, mask_type: Any, **_: Any) -> Any:
    """Compute what cuDNN promises of offsets: each text alone, and nothing for tokens of no text."""
    places = jnp.arange(q.shape[1])[:, None] - q_offsets[:, None, :-1]
    is_in = (places >= 0) & (places < q_seqlen[:, None, :]) & (q_offsets[:, None, :-1] >= 0)
    seen = jnp.einsum("rtm,rsm->rts", is_in, is_in) > 0
    if mask_type == library.MaskType.CAUSAL:
        seen &= jnp.tri(q.shape[1], dtype=bool)
    assert k.shape == q.shape
    out = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale)
    return jnp.where(seen.any(-1)[..., None, None], out, jnp.nan)


@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL])
def test_arguments_for_cudnn_agree_with_einsum(mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's implementation replaces cuDNN, so this checks offsets, mask, scale and grouped heads of the calls."""
    xla_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(library, "dot_product_attention", attend_by_offsets)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, implementation=None, **options: xla_attention(*x, **options)
    )
    inputs = draw_check_inputs(8)
    errors = [measure_error(attend, inputs, mask) for attend in (attend_einsum, attend_packed, attend_masked)]
    assert min(errors) > 0 and max(errors) < cudnn.MAX_RELATIVE_ERROR / 2
    wrong_mask = BIDIRECTIONAL if mask == CAUSAL else CAUSAL
    assert measure_error(lambda *x: attend_einsum(*x[:4], wrong_mask, None), inputs, mask) > 5 * cudnn.MAX_RELATIVE_ERROR


@pytest.mark.usefixtures("gpu")
def test_a_gpu_whose_cudnn_fails_or_differs_uses_einsum(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The comparison runs here, where cuDNN cannot: packed and masked attention both fail."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with caplog.at_level(logging.INFO, "jaxembed"):
        assert not list_calls(lower_text("causal", None, jnp.bfloat16))
    (record,) = caplog.records
    assert record.message.startswith("attention kernel cudnn does not support this GPU (")
    assert find_fault(attend_einsum, CAUSAL, 8) == ""
    monkeypatch.setattr(cudnn, "MAX_RELATIVE_ERROR", 0.0)
    assert re.fullmatch(r"its results differ by 0\.00\d+ from those of einsum", find_fault(attend_einsum, BIDIRECTIONAL, 8))
