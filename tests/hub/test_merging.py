"""Merging models: the arithmetic, what the models must have in common, and the exported folder."""

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
from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.errors import UserError
from jaxembed.formats.peft import write_adapters
from jaxembed.hub.merging import merge_models
from jaxembed.hub.spec_files import write_spec
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.merge import parse_weights
from jaxembed.model import interpolation
from jaxembed.model.interpolation import METHODS, interpolate

SPEC = EmbeddingSpec(attention="causal", pooling="last", max_length=64, prompts={"query": "q:"})


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a single device, because programs compile faster for it."""
    use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write three folders of one shape and spec, with different weights."""
    root = tmp_path_factory.mktemp("models")
    folders = [tiny.write_folder(root / name, "qwen3", seed) for seed, name in enumerate("abc")]
    for folder in folders:
        write_spec(folder, SPEC)
    return [str(folder) for folder in folders]


def tree(*layers: Sequence[float], rest: Sequence[float] = (0.0,)) -> dict[str, Any]:
    """Return parameters: one tensor per layer, and one outside the layers."""
    stacked = np.array(layers, np.float32)
    return {"decoder": {"layers": {"up": {"kernel": stacked}}, "embedding": np.array(rest, np.float32)}}


def merged(trees: Sequence[Any], weights: Sequence[float], method: str) -> tuple[np.ndarray, np.ndarray]:
    transformer = interpolate(iter(trees), list(map(float, weights)), method)["decoder"]
    return transformer["layers"]["up"]["kernel"], transformer["embedding"]


def test_soup_is_the_weighted_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolation, "FLOAT64_CHUNK", 2)
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
    assert a["decoder"]["layers"]["up"]["kernel"][0, 0] == 1, "the models must not change"


def test_slerp_follows_the_arc_between_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer on its own: directions follow the arc, lengths change linearly. Without an arc it is the line."""
    monkeypatch.setattr(interpolation, "FLOAT64_CHUNK", 2)
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


def test_one_model_at_a_time_is_in_memory() -> None:
    references: list[weakref.ref[Any]] = []

    def models() -> Iterator[Any]:
        for _ in range(3):
            assert all(ref() is None for ref in references)
            tensor = jnp.ones(4)
            references.append(weakref.ref(tensor))
            yield {"x": tensor}
            del tensor

    np.testing.assert_array_equal(interpolate(models(), [1.0, 1.0, 1.0], "soup")["x"], np.ones(4))
    assert len(references) == 3


@pytest.mark.parametrize(
    ("option", "method", "model_count", "expected"),
    [
        (None, "soup", 4, [0.25] * 4),
        ("1,3", "soup", 2, [0.25, 0.75]),
        ("0,0,2", "soup", 3, [0, 0, 1]),
        (None, "slerp", 2, [0.5, 0.5]),
        ("0.25", "slerp", 2, [0.75, 0.25]),
        ("1", "slerp", 2, [0, 1]),
        (None, "soup", 1, "soup of 1 model: expected two models or more"),
        (None, "slerp", 3, "slerp of 3 models: expected two models, between"),
        ("1,2", "soup", 3, r"--weights: 1,2 does not fit the models \(expected 3 numbers, one per model"),
        ("1,-1", "soup", 2, "none negative"),
        ("0,0", "soup", 2, "not all 0"),
        ("nan,1", "soup", 2, "expected 2 numbers"),
        ("a,b", "soup", 2, "expected numbers such as"),
        ("0.5,0.5", "slerp", 2, r"does not fit slerp \(expected one number from 0 to 1"),
        ("1.5", "slerp", 2, r"does not fit slerp \(expected one number from 0 to 1"),
    ],
)
def test_weights_are_parsed(option: str | None, method: str, model_count: int, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            parse_weights(option, method, model_count)
    else:
        assert parse_weights(option, method, model_count) == expected
    assert set(merge.METHOD_NAMES) == set(METHODS)


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process. Return its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "jaxembed.merge", raising=False)
    monkeypatch.setattr("os._exit", sys.exit)  # a command that fails would end this process
    code = 0
    try:
        runpy.run_module("jaxembed.merge", run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_merged_folder_is_an_ordinary_model(models: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
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
    code, _, errors = run(tmp_path / "no", *models, "--method", "slerp", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, errors.splitlines()[-1][:26]) == (2, "error: slerp of 3 models: ")


def vectors(models: Sequence[str], weights: Sequence[float], method: str = "soup") -> np.ndarray:
    return merge_models(models, weights, method, "merged")[0].encode(tiny.TEXTS)


def test_merging_a_model_with_itself_changes_nothing(models: list[str]) -> None:
    alone = Embedder.load(models[0]).encode(tiny.TEXTS)
    for method in METHODS:
        np.testing.assert_allclose(vectors([models[0]] * 2, [0.3, 0.7], method), alone, atol=1e-6)
    assert np.abs(vectors(models[:2], [0.5, 0.5]) - alone).max() > 1e-2


def test_adapters_are_first_merged_into_their_base(models: list[str], tmp_path: Path) -> None:
    random, shapes = np.random.default_rng(0), {"lora_a": (3, 32, 2), "lora_b": (3, 2, 64)}
    q = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    write_adapters(
        tmp_path,
        {"decoder": {"layers": {"attention": {"q": q}}}},
        LoraConfig(rank=2, alpha=4.0, targets=("q_proj",)),
        models[1],
    )
    embedder, card = merge_models([models[0], str(tmp_path)], [0.5, 0.5], "soup", "merged")
    first, base = (Embedder.load(model).params["decoder"]["layers"]["attention"]["q"]["kernel"] for model in models[:2])
    expected = (np.asarray(first) + np.asarray(base) + 2 * q["lora_a"] @ q["lora_b"]) / 2
    np.testing.assert_allclose(embedder.params["decoder"]["layers"]["attention"]["q"]["kernel"], expected, atol=1e-6)
    assert f"`{tmp_path.name}`" in card.merging


def change_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "rope_parameters": None}))


def change_spec(folder: Path) -> None:
    write_spec(folder, EmbeddingSpec(**{**vars(SPEC), "pooling": "mean"}))


def change_tokenizer(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_shape, "transformer.rope_theta: 10000.0 -> 500000.0"),
        (change_spec, "spec.pooling: 'last' -> 'mean'"),
        (change_tokenizer, "tokenizer.model.vocab."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_differ_are_refused_before_weights_are_read(
    models: list[str], tmp_path: Path, change: Callable[[Path], None], difference: str, monkeypatch, capsys
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models[1], other)
    change(other)
    (other / "model.safetensors").unlink()
    code, out, err = run(tmp_path / "out", *models, other, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        f"error: {other}: cannot be merged with {models[0]}, because they differ ({difference}"
    )
    assert not (tmp_path / "out").exists()


def test_prompts_and_max_length_are_those_of_the_first_model(models: list[str], tmp_path: Path, caplog) -> None:
    shutil.copytree(models[1], tmp_path / "other")
    write_spec(tmp_path / "other", EmbeddingSpec(**{**vars(SPEC), "prompts": {"query": "ask:"}, "max_length": 32}))
    embedder, _ = merge_models([models[0], str(tmp_path / "other")], [0.5, 0.5], "soup", "merged")
    assert embedder.spec == SPEC
    warning = f"{tmp_path / 'other'}: %s differs from that of {models[0]}, which is used"
    assert [warning % key in caplog.text for key in ("prompts", "max_length", "pooling")] == [True, True, False]
    with pytest.raises(UserError, match=r"preset:tiny: a preset has no weights\. Train it first"):
        merge_models([models[0], "preset:tiny"], [0.5, 0.5], "soup", "merged")
