"""Quantized vectors as they are scored, and with straight-through gradients in training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.text_batches import draw_unit_vectors, make_batch
from jaxembed import export
from jaxembed.config import EmbeddingMatchingConfig, InfoNCEConfig, MatryoshkaConfig, QuantizationConfig
from jaxembed.errors import UserError
from jaxembed.formats.run_files import BASE_RECORD_FILE
from jaxembed.losses.objectives import Objectives
from jaxembed.losses.quantized import quantize_straight_through
from jaxembed.runs.ranges import open_ranges
from jaxembed.search.precision import (
    RANGES_FILE,
    compute_steps,
    find_ranges,
    merge_ranges,
    quantize_vectors,
    simulate_quantization,
)
from jaxembed.search.quantized import search_quantized

VECTORS = draw_unit_vectors(np.random.default_rng(0), 12, 24).astype(np.float32)
RANGES = merge_ranges(None, draw_unit_vectors(np.random.default_rng(1), 8, 24).astype(np.float32))  # some numbers are outside
NESTED = tuple(map(tuple, RANGES.tolist()))


def test_scores_are_the_cosines_of_the_stored_values() -> None:
    binary = simulate_quantization(VECTORS, "binary")
    bits = np.unpackbits(quantize_vectors(VECTORS, "ubinary"), axis=1)
    hamming = (bits[:, None] != bits[None]).sum(axis=-1)
    np.testing.assert_allclose(binary @ binary.T, 1 - 2 * hamming / 24, atol=1e-6)
    numbers = quantize_vectors(VECTORS, "int8", RANGES).astype(np.float64)
    lengths = np.linalg.norm(numbers, axis=1)
    scored = simulate_quantization(VECTORS, "int8", RANGES)
    np.testing.assert_allclose(scored @ scored.T, numbers @ numbers.T / np.outer(lengths, lengths), atol=1e-6)
    np.testing.assert_array_equal(scored, simulate_quantization(VECTORS, "uint8", RANGES))
    assert simulate_quantization(VECTORS, "float32") is VECTORS


def test_quantized_vectors_are_constants() -> None:
    """Steps of 0.01 from -0.998: 0.6 is level 159, which is 31 as int8, -0.8 is level 19, and 2 is clipped to level 255."""
    vectors, ranges = jnp.array([[0.6, -0.8], [2.0, 0.0]]), ((-0.998,) * 2, (1.552,) * 2)
    expected = np.array([[31, -109], [127, -29]]) / np.sqrt([[31**2 + 109**2], [127**2 + 29**2]])
    np.testing.assert_allclose(quantize_straight_through(vectors, "int8", ranges), expected, rtol=1e-6)
    half = 0.5**0.5
    np.testing.assert_allclose(quantize_straight_through(vectors, "binary", ()), [[half, -half], [half, -half]], rtol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_training_uses_the_scored_vectors(precision: Any) -> None:
    vectors = jnp.concatenate([VECTORS, jnp.zeros((1, 24))])
    trained = jax.jit(lambda v: quantize_straight_through(v, precision, NESTED))(vectors)
    np.testing.assert_allclose(trained[:-1], simulate_quantization(VECTORS, precision, RANGES), atol=2e-6)
    assert not trained[-1].any(), "an absent text stays absent"


def test_gradients_pass_straight_through_the_rounding() -> None:
    """Those of signs are the identity. Those of int8 are of the scaled numbers, and zero for numbers outside the ranges."""
    weights = jax.device_put(np.random.default_rng(1).normal(size=VECTORS.shape).astype(np.float32))
    grad = jax.grad(lambda v: jnp.sum(weights * quantize_straight_through(v, "binary", ())))(jnp.asarray(VECTORS))
    np.testing.assert_array_equal(grad, weights)
    grad = jax.grad(lambda v: jnp.sum(weights * quantize_straight_through(v, "int8", NESTED)))(jnp.asarray(VECTORS))
    is_clipped = (RANGES[0] > VECTORS) | (RANGES[1] < VECTORS)
    assert is_clipped.any() and not np.asarray(grad)[is_clipped].any()
    levels = quantize_vectors(VECTORS, "int8", RANGES).astype(np.float32)
    norms = np.linalg.norm(levels, axis=1, keepdims=True)
    unit = levels / norms
    projected = (weights - unit * np.sum(unit * weights, axis=1, keepdims=True)) / norms  # by the normalization
    expected = np.where(is_clipped, 0, projected * 255 / (RANGES[1] - RANGES[0]))
    inside = ~is_clipped & (RANGES[0] < VECTORS) & (RANGES[1] > VECTORS)
    np.testing.assert_allclose(np.asarray(grad)[inside], expected[inside], rtol=1e-3, atol=1e-4)


def test_a_dimension_that_is_constant_up_to_rounding_has_no_gradient() -> None:
    """all-MiniLM-L6-v2 has one, with values of 1e-33."""
    ranges, vectors = RANGES.copy(), VECTORS.copy()
    ranges[:, 0], vectors[:, 0] = (0, 1e-32), 5e-33
    nested = tuple(map(tuple, ranges.tolist()))
    grad = jax.grad(lambda v: jnp.sum(quantize_straight_through(v, "int8", nested)[:, :3]))(jnp.asarray(vectors))
    assert np.isfinite(grad).all() and not grad[:, 0].any() and grad[:, 1].any()


def test_objectives_apply_to_every_precision_as_to_a_width() -> None:
    names = list("abcdef")
    batch = make_batch(names, [[f"{name} 0", f"{name} 1"] for name in names])
    q, d = jnp.asarray(VECTORS[:6]), jnp.asarray(np.stack([VECTORS[6:], VECTORS[5:11]], axis=1))
    config = QuantizationConfig(precisions=("binary", "int8"), weights=(0.5, 2.0))
    objectives = Objectives([InfoNCEConfig()], MatryoshkaConfig(dims=(8,)), quantization=config, ranges=NESTED)
    total, parts = jax.jit(lambda q, d: objectives(q, d, batch, jax.random.key(0), {}, 1))(q, d)
    for precision in ("binary", "int8"):
        quantized = (
            jnp.asarray(simulate_quantization(np.asarray(x).reshape(-1, 24), precision, RANGES)).reshape(x.shape)
            for x in (q, d)
        )
        alone, _ = Objectives([InfoNCEConfig()])(*quantized, batch, jax.random.key(0), {}, 1)
        assert parts[f"infonce_{precision}"] == pytest.approx(float(alone), rel=1e-4)
    expected = parts["infonce"] + parts["infonce_8"] + 0.5 * parts["infonce_binary"] + 2 * parts["infonce_int8"]
    assert total == pytest.approx(float(expected), rel=1e-5)
    assert not Objectives([], quantization=config)._list_versions(EmbeddingMatchingConfig(teacher="a model"))


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary", "float32"])
def test_search_over_quantized_vectors_finds_the_best_scores(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all scores, with queries in several blocks; for bits, documents that differ in few of them."""
    random = np.random.default_rng(2)
    documents, queries = (draw_unit_vectors(random, n, 24).astype(np.float32) for n in (40, 7))
    stored = quantize_vectors(documents, precision, RANGES)
    monkeypatch.setattr("jaxembed.search.quantized.choose_faiss_batch_size", lambda *_: 3)
    found = search_quantized(queries, stored, 5, precision, RANGES if "int8" in precision else None)
    middles = documents
    if "int8" in precision:
        levels = stored.astype(np.float64) + (128 if precision == "int8" else 0)
        middles = RANGES[0] + (levels + 0.5) * compute_steps(RANGES)
    if "binary" in precision:
        middles = np.where(documents > 0, 1, -1) / np.sqrt(24)
        different = ((queries[:, None] > 0) != (documents[None] > 0)).sum(axis=-1)
        limit = np.sort(different, axis=1)[:, 19]  # of 4 x 5 documents
        assert (np.take_along_axis(different, found.indices, axis=1) <= limit[:, None]).all()
    scores = queries @ middles.T
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, found.indices, axis=1), atol=1e-5)
    assert (np.diff(found.scores, axis=1) <= 1e-6).all()
    if "binary" not in precision:
        np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :5], atol=1e-5)
    assert search_quantized(queries[:0], stored, 5, precision, RANGES if "int8" in precision else None).indices.shape == (0, 5)


def test_search_over_quantized_vectors_refuses_other_layouts() -> None:
    bits = quantize_vectors(VECTORS, "ubinary")
    with pytest.raises(UserError, match=r"documents are uint8 of 3 columns \(expected int8 of 24: int8 vectors of"):
        search_quantized(VECTORS, bits, 3, "int8", RANGES)
    with pytest.raises(UserError, match=r"^search_quantized: int8 needs ranges \(found none\)"):
        search_quantized(VECTORS, quantize_vectors(VECTORS, "int8", RANGES), 3, "int8")


def test_ranges_of_a_model_below_the_home_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path, out = tmp_path / "model" / RANGES_FILE, tmp_path / "out"
    for folder in (path.parent, out):
        folder.mkdir()
    np.save(path, np.array([[-1, -1], [1, 1]], np.float32))
    assert find_ranges(["int8"], "~/model", None) == path
    stage = SimpleNamespace(quantization=SimpleNamespace(precisions=["int8"], ranges=None))
    config: Any = SimpleNamespace(stages=[stage], run=SimpleNamespace(dir=str(out)))
    base: Any = SimpleNamespace(name="~/model")
    np.testing.assert_array_equal(open_ranges(config, base, width=2), np.load(path))
    args = export.make_parser().parse_args(["~/model", str(out)])
    export.copy_ranges(args, out)
    assert (out / RANGES_FILE).read_bytes() == path.read_bytes()
    (path.parent / BASE_RECORD_FILE).write_text("{}")
    export.check_adapter_options(args)
