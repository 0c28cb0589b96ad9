"""Models merged into one: the numbers, what must agree, and the folder that comes out."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers import tiny
from helpers.runs import use_one_device
from jaxembed import Embedder, merge
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.formats.peft import write_adapters
from jaxembed.hub.base import write_spec
from jaxembed.hub.export import encode_torch, load_sentence_transformer
from jaxembed.hub.merging import merge_models
from jaxembed.merge import model_weights
from jaxembed.model import interpolation
from jaxembed.model.interpolation import METHODS, interpolate
from jaxembed.model.lora import LoRA

SPEC = EmbeddingSpec(attention="causal", pooling="last", max_length=64, prompts={"query": "q:"})


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs compile faster."""
    use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three folders of one shape and spec, with different weights."""
    root = tmp_path_factory.mktemp("models")
    folders = [tiny.folder(root / name, "qwen3", seed) for seed, name in enumerate("abc")]
    for folder in folders:
        write_spec(folder, SPEC)
    return [str(folder) for folder in folders]


def tree(*layers: Sequence[float], rest: Sequence[float] = (0.0,)) -> dict[str, Any]:
    """Parameters: a tensor of each layer, and one beside the layers."""
    stacked = np.array(layers, np.float32)
    return {"decoder": {"layers": {"up": {"kernel": stacked}}, "embedding": np.array(rest, np.float32)}}


def merged(trees: Sequence[Any], weights: Sequence[float], method: str) -> tuple[np.ndarray, np.ndarray]:
    decoder = interpolate(iter(trees), list(map(float, weights)), method)["decoder"]
    return decoder["layers"]["up"]["kernel"], decoder["embedding"]


def test_a_soup_is_the_weighted_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolation, "NUMBERS_AT_ONCE", 2)
    a, b, c = tree([1, 2, 3], [4, 5, 6], rest=[1]), tree([3, 0, 3], [0, 5, 8], rest=[-1]), tree([8] * 3, [2] * 3, rest=[9])
    for given, expected, rest in (
        (([a, b], [0.5, 0.5]), [[2, 1, 3], [2, 5, 7]], [0]),
        (([a, b], [0.25, 0.75]), [[2.5, 0.5, 3], [1, 5, 7.5]], [-0.5]),
        (([a, b, c], [1, 1, 2]), [[5, 4.5, 5.5], [2, 3.5, 4.5]], [4.5]),
        (([a, b, c], [0, 0, 1]), [[8] * 3, [2] * 3], [9]),
    ):
        kernel, embedding = merged(*given, "soup")
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(kernel, expected)
        np.testing.assert_array_equal(embedding, rest)
    assert a["decoder"]["layers"]["up"]["kernel"][0, 0] == 1, "the models stay as they are"


def test_the_arc_between_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer by itself: directions along the arc, lengths evenly; the line where there is no arc."""
    monkeypatch.setattr(interpolation, "NUMBERS_AT_ONCE", 2)
    half = np.sqrt(0.5)
    a, b = tree([1, 0, 0], [0, 2, 0], rest=[0]), tree([0, 1, 0], [0, 0, 6], rest=[2])
    kernel, zero = merged([a, b], [0.5, 0.5], "slerp")
    np.testing.assert_allclose(kernel, [[half, half, 0], [0, 4 * half, 4 * half]], rtol=1e-6)
    np.testing.assert_array_equal(zero, [1])
    kernel, _ = merged([a, b], [2 / 3, 1 / 3], "slerp")
    np.testing.assert_allclose(kernel[0], [np.cos(np.pi / 6), np.sin(np.pi / 6), 0], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(kernel[1]), 2 + 4 / 3, rtol=1e-6)
    for weights, end in (([1, 0], a), ([0, 1], b)):
        for got, expected in zip(merged([a, b], weights, "slerp"), jax.tree.leaves(end)[::-1], strict=True):
            np.testing.assert_array_equal(got, expected)

    parallel_, opposite = tree([3, 4, 0], [3, 4, 0]), tree([6, 8, 1e-5], [-6, -8, 0])
    kernel, _ = merged([parallel_, opposite], [0.75, 0.25], "slerp")
    np.testing.assert_array_equal(kernel, merged([parallel_, opposite], [0.75, 0.25], "soup")[0])
    assert METHODS["slerp"](*np.float32([[1, 0], [1, 1e-3]]), 0.25) != (0.75, 0.25), "a fine-tune's angle is an angle"


def test_a_model_is_let_go_before_the_next_is_made() -> None:
    held: list[weakref.ref[Any]] = []

    def models() -> Iterator[Any]:
        for _ in range(3):
            assert all(ref() is None for ref in held)
            made = jnp.ones(4)
            held.append(weakref.ref(made))
            yield {"x": made}
            del made

    np.testing.assert_array_equal(interpolate(models(), [1.0, 1.0, 1.0], "soup")["x"], np.ones(4))
    assert len(held) == 3


@pytest.mark.parametrize(
    ("given", "method", "models", "weights"),
    [
        (None, "soup", 4, [0.25] * 4),
        ("1,3", "soup", 2, [0.25, 0.75]),
        ("0,0,2", "soup", 3, [0, 0, 1]),
        (None, "slerp", 2, [0.5, 0.5]),
        ("0.25", "slerp", 2, [0.75, 0.25]),
        ("1", "slerp", 2, [0, 1]),
        (None, "soup", 1, "soup of 1 model: name two models or more"),
        (None, "slerp", 3, "slerp of 3 models: name two models, between"),
        ("1,2", "soup", 3, "--weights is 1,2; expected 3 numbers, one a model"),
        ("1,-1", "soup", 2, "of at least 0"),
        ("0,0", "soup", 2, "and not all 0"),
        ("nan,1", "soup", 2, "expected 2 numbers"),
        ("a,b", "soup", 2, "expected numbers with commas"),
        ("0.5,0.5", "slerp", 2, "slerp expects one number from 0 to 1"),
        ("1.5", "slerp", 2, "slerp expects one number from 0 to 1"),
    ],
)
def test_weights(given: str | None, method: str, models: int, weights: Any) -> None:
    if isinstance(weights, str):
        with pytest.raises(UserError, match=weights):
            model_weights(given, method, models)
    else:
        assert model_weights(given, method, models) == weights
    assert set(merge.METHODS) == set(METHODS)


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The command in this process: its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "jaxembed.merge", raising=False)
    code = 0
    try:
        runpy.run_module("jaxembed.merge", run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_merged_folder_is_an_ordinary_one(models: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(out, *models, "--weights", "1,1,2", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    result = json.loads(printed.splitlines()[-1])
    assert (result["folder"], result["method"], result["weights"]) == (str(out), "soup", [0.25, 0.25, 0.5])
    whole, *parts = (flatten_dict(Embedder.load(folder).params) for folder in [str(out), *models])
    assert len(whole) > 10
    for path, x in whole.items():
        a, b, c = (np.asarray(part[path], np.float64) for part in parts)
        np.testing.assert_allclose(x, 0.25 * a + 0.25 * b + 0.5 * c, rtol=1e-6, atol=1e-7)
    model = Embedder.load(out)
    assert model.spec == SPEC
    stock = encode_torch(load_sentence_transformer(out), tiny.TEXTS, "q:")
    np.testing.assert_allclose(stock, model.encode(tiny.TEXTS, prompt="q:"), atol=1e-5)
    card = (out / "README.md").read_text()
    assert "merged with jaxembed" in card and "weighted mean" in card and "trained with" not in card
    assert all(f"| {share} | `{name}` | " in card for share, name in ((0.25, "a"), (0.25, "b"), (0.5, "c")))

    assert run(out, *models, monkeypatch=monkeypatch, capsys=capsys)[0] == 2
    code, _, told = run(tmp_path / "no", *models, "--method", "slerp", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, told.splitlines()[-1][:26]) == (2, "error: slerp of 3 models: ")


def vectors(models: Sequence[str], weights: Sequence[float], method: str = "soup") -> np.ndarray:
    return merge_models(models, weights, method, "merged")[0].encode(tiny.TEXTS)


def test_a_model_with_itself_is_that_model(models: list[str]) -> None:
    alone = Embedder.load(models[0]).encode(tiny.TEXTS)
    for method in METHODS:
        np.testing.assert_allclose(vectors([models[0]] * 2, [0.3, 0.7], method), alone, atol=1e-6)
    assert np.abs(vectors(models[:2], [0.5, 0.5]) - alone).max() > 1e-2


def test_adapters_are_merged_into_their_base_first(models: list[str], tmp_path: Path) -> None:
    random, shapes = np.random.default_rng(0), {"lora_a": (3, 32, 2), "lora_b": (3, 2, 64)}
    q = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    write_adapters(tmp_path, {"decoder": {"layers": {"attention": {"q": q}}}}, LoRA(2, 4.0, targets=("q_proj",)), models[1])
    embedder, card = merge_models([models[0], str(tmp_path)], [0.5, 0.5], "soup", "merged")
    first, base = (Embedder.load(model).params["decoder"]["layers"]["attention"]["q"]["kernel"] for model in models[:2])
    expected = (np.asarray(first) + np.asarray(base) + 2 * q["lora_a"] @ q["lora_b"]) / 2
    np.testing.assert_allclose(embedder.params["decoder"]["layers"]["attention"]["q"]["kernel"], expected, atol=1e-6)
    assert f"`{tmp_path.name}`" in card.merged


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "rope_parameters": None}))


def other_spec(folder: Path) -> None:
    write_spec(folder, EmbeddingSpec(**{**vars(SPEC), "pooling": "mean"}))


def other_words(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_shape, "decoder.rope_theta: 10000.0 -> 500000.0"),
        (other_spec, "spec.pooling: 'last' -> 'mean'"),
        (other_words, "tokenizer.model.vocab."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_differ_are_refused_before_they_are_read(
    models: list[str], tmp_path: Path, change: Callable[[Path], None], told: str, monkeypatch, capsys
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models[1], other)
    change(other)
    (other / "model.safetensors").unlink()
    code, out, err = run(tmp_path / "out", *models, other, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {other}: cannot be merged with {models[0]}, from which it differs ({told}")
    assert not (tmp_path / "out").exists()


def test_prompts_and_length_are_those_of_the_first(models: list[str], tmp_path: Path, caplog) -> None:
    shutil.copytree(models[1], tmp_path / "other")
    write_spec(tmp_path / "other", EmbeddingSpec(**{**vars(SPEC), "prompts": {"query": "ask:"}, "max_length": 32}))
    embedder, _ = merge_models([models[0], str(tmp_path / "other")], [0.5, 0.5], "soup", "merged")
    assert embedder.spec == SPEC
    told = f"{tmp_path / 'other'}: its %s differs from that of {models[0]}, which is kept"
    assert [told % key in caplog.text for key in ("prompts", "max_length", "pooling")] == [True, True, False]
    with pytest.raises(UserError, match="preset:tiny: a preset has no weights; train it first"):
        merge_models([models[0], "preset:tiny"], [0.5, 0.5], "soup", "merged")
