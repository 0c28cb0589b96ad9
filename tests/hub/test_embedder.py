"""`Embedder`: long texts, texts that are presented twice, rows of several lengths, and parameters on several devices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers import tiny
from jaxembed import Embedder, cli
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub import embedder
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.export import export
from jaxembed.hub.identity import compute_model_digest
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import parse_spec
from jaxembed.model.transformer import ComputeOptions

LONG_TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps " * 20


@pytest.fixture(scope="module")
def model(base_folder: Callable[[str], Path]) -> Embedder:
    return Embedder.load(base_folder("qwen3"))


def load_with_spec(base_folder: Callable[[str], Path], spec: EmbeddingSpec) -> Embedder:
    return load_embedder(find_base(str(base_folder("qwen3"))), spec, ComputeOptions(), make_mesh(1))


@pytest.mark.parametrize(("long_texts", "combine"), [("mean", np.mean), ("max", np.max)])
def test_long_text_is_encoded_to_its_end(model: Embedder, long_texts: str, combine: Callable[..., np.ndarray]) -> None:
    texts = ["short", LONG_TEXT + "and wakes up", "also short", LONG_TEXT]
    vectors = model.encode(texts, prompt="query: ", long_texts=long_texts)
    # The vector of a long text combines those of its pieces.
    (pieces,) = model.tokenizer.split_texts([texts[1]], "query: ")
    assert len(pieces) > 2
    combined = combine(model.encode(pieces, prompt="query: "), axis=0)
    np.testing.assert_allclose(vectors[1], combined / np.linalg.norm(combined), atol=1e-5)
    # Short texts have the same vectors as without pieces. The long ones differ only past the cut.
    truncated = model.encode(texts, prompt="query: ")
    np.testing.assert_allclose(vectors[[0, 2]], truncated[[0, 2]], atol=1e-5)
    assert np.array_equal(truncated[1], truncated[3])
    assert np.abs(vectors[1] - vectors[3]).max() > 1e-3
    # A smaller dim keeps the first numbers.
    narrow = model.encode(texts, prompt="query: ", long_texts=long_texts, dim=8)
    np.testing.assert_allclose(narrow, vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True), atol=1e-5)


def test_equal_texts_are_encoded_once(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = np.array(["one", "two", "one", "three", "two", "one"])
    expected = np.concatenate([model.encode([str(text)]) for text in texts])
    encoded: list[str] = []
    apply_to_texts = Embedder.apply_to_texts

    def record(self: Embedder, texts: Any, *arguments: Any) -> np.ndarray:
        encoded.extend(texts)
        return apply_to_texts(self, texts, *arguments)

    monkeypatch.setattr(Embedder, "apply_to_texts", record)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-6)  # type: ignore[arg-type]
    assert encoded == ["one", "two", "three"]


def test_unknown_value_of_long_texts_is_refused(model: Embedder) -> None:
    with pytest.raises(UserError, match=r"long_texts: 'middle' is unknown \(expected cut, mean, max\)"):
        model.encode(["x"], long_texts="middle")


def test_programs_of_a_single_cpu_read_each_layer_without_a_copy(model: Embedder, base_folder: Callable[[str], Path]) -> None:
    single = Embedder.load(base_folder("qwen3"), mesh=make_mesh(devices=jax.devices()[:1]))
    stacked = single.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    kernels = [layer["mlp"]["up"]["kernel"] for layer in single._program_params["decoder"]["layers"]]
    offsets = [x.unsafe_buffer_pointer() - stacked.unsafe_buffer_pointer() for x in kernels]
    assert offsets == [layer * stacked[0].nbytes for layer in range(single.model.transformer.layers)]
    for other in (model, single.keep_first_layers(single.model.transformer.layers), single.with_params(single.params)):
        np.testing.assert_allclose(other.encode([LONG_TEXT, "short"]), single.encode([LONG_TEXT, "short"]), atol=1e-5)
    shallow = single.keep_first_layers(1)
    assert np.abs(shallow.encode(["short"]) - single.encode(["short"])).max() > 1e-3


def test_fsdp_splits_parameters_and_keeps_vectors(model: Embedder, base_folder: Callable[[str], Path]) -> None:
    parser = cli.new_parser("encode", "")
    cli.add_model_arguments(parser)
    folder = str(base_folder("qwen3"))
    args = parser.parse_args([folder, "--fsdp", "4"])
    split = cli.load_model(args.model, **cli.get_model_options(args))
    shard = split.params["decoder"]["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data
    assert shard.shape[1] == model.model.transformer.width // 4
    np.testing.assert_allclose(split.encode([LONG_TEXT, "short"]), model.encode([LONG_TEXT, "short"]), atol=1e-5)
    with pytest.raises(UserError, match=r"^mesh.fsdp=3: does not divide the model's embed"):
        Embedder.load(folder, mesh=make_mesh(2, 3))


def test_short_texts_in_rows_of_several_lengths_keep_vectors_and_order(
    base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "ENCODE_TOKENS_PER_CALL", 256)  # so that few texts fill rows of several lengths
    shapes, fill_rows = [], embedder.fill_rows
    monkeypatch.setattr(embedder, "fill_rows", lambda *args: shapes.append(args[-1]) or fill_rows(*args))
    model = load_with_spec(base_folder, EmbeddingSpec(attention="causal", pooling="mean", max_length=128))
    texts = [f"fox {i} " + "sleeps " * (i % 7) for i in range(120)]
    texts.insert(50, LONG_TEXT)
    vectors = model.encode(texts)
    assert {row_length for _, row_length in shapes} == {64, 128}
    for i in (0, 49, 50, 51, 120):
        np.testing.assert_allclose(vectors[i], model.encode([texts[i]])[0], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_echo_pools_the_second_copy_which_attends_to_the_first(base_folder: Callable[[str], Path], pooling: str) -> None:
    text, first_copy = "the fox sleeps", "Say: the fox sleeps\nAgain:"
    spec = EmbeddingSpec(attention="causal", pooling=pooling, max_length=64, include_instruction=False)
    plain = load_with_spec(base_folder, spec)
    echo = load_with_spec(base_folder, spec.replace(echo="Say: {text}\nAgain: {text}"))
    (echo_ids,), (plain_ids,) = echo.tokenizer([text], [""]).ids, plain.tokenizer([f" {text}"], [first_copy]).ids
    assert echo_ids.tolist() == plain_ids.tolist()
    np.testing.assert_allclose(echo.encode([text]), plain.encode([f" {text}"], prompt=first_copy), atol=1e-5)
    assert np.abs(echo.encode([text]) - plain.encode([text])).max() > 1e-2


def test_echo_that_cannot_work_is_refused(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    spec = EmbeddingSpec(max_length=64, echo="{text} {text}", include_instruction=False)
    with pytest.raises(UserError, match=r"model\.echo presents a text twice"):
        export(load_with_spec(base_folder, spec), tmp_path / "out", "float32", Card("echo", "base"))
    with pytest.raises(UserError, match=r"model\.echo: only the second copy .*include_instruction=false"):
        load_with_spec(base_folder, spec.replace(include_instruction=True))
    with pytest.raises(UserError, match=r"echo must contain \{text\} twice and end with it"):
        parse_spec({"echo": "{text} once"}, "FILE")


class Frame(dict):  # type: ignore[type-arg]
    """A table with columns, such as a DataFrame. Iteration gives the names of its columns."""

    columns = ("text",)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("text", "texts is a single str; expected a list of strings"),
        (b"text", "texts is a single bytes"),
        ({"text": ["a", "b", "c"]}, "texts is a dict; expected a list of strings, such as one of its columns as a list"),
        (Frame(text=["a", "b", "c"]), "texts is a Frame"),
        ({"a", "b"}, "texts is a set"),
        (None, "texts is a NoneType"),
        (iter(["a"]), "texts is a list_iterator; expected a list of strings"),
        (["a", None], r"texts\[1\] is null \(NoneType\); expected a string"),
        (["a", "b", 3], r"texts\[2\] is 3 \(int\); expected a string"),
        ([float("nan")], r"texts\[0\] is nan \(float\)"),
        ([["a", "b"]], r"texts\[0\] is a list of 2 \(list\)"),
        (["a"] * 5000 + [b"x"], r"texts\[5000\] is b'x' \(bytes\)"),
        (["é", "\ud83d"], r"texts\[1\] is '\\ud83d', with a lone surrogate"),
    ],
)
def test_texts_that_are_not_strings_are_named(model: Embedder, texts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^encode: {message}"):
        model.encode(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instruction": 5}, r"instruction is 5 \(int\); expected a string"),
        ({"prompt": ["a"]}, r"prompt is a list of 1 \(list\); expected a string"),
        ({"dim": 2.0}, r"dim is 2\.0 \(float\); expected an integer"),
        ({"dim": True}, r"dim is true \(bool\); expected an integer"),
    ],
)
def test_options_of_another_type_are_named(model: Embedder, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^encode: {message}"):
        model.encode(["a"], **options)


def test_columns_of_tables_are_encoded(model: Embedder) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["one", "two", "three"]}, index=[7, 8, 9])
    with pytest.raises(TypeError, match=r"^encode: texts is a DataFrame"):
        model.encode(frame)
    expected = model.encode(["one", "two", "three"])
    np.testing.assert_array_equal(model.encode(frame["text"]), expected)
    np.testing.assert_array_equal(model.encode(np.array(["one", "two", "three"])), expected)
    np.testing.assert_array_equal(model.encode(("one", "two", "three")), expected)


def test_digest_identifies_weights_spec_and_tokenizer(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base_folder("qwen3")
    digest = compute_model_digest(Embedder.load(folder))
    copy = shutil.copytree(folder, tmp_path / "other name")
    model = Embedder.load(copy)
    model.encode(["a text"])
    assert compute_model_digest(model) == digest, "neither its name nor earlier calls matter"
    # Another spec, first layers, dtype, tokenizer, and other weights.
    others = [
        load_with_spec(base_folder, model.spec.replace(**change))
        for change in ({"pooling": "last"}, {"append_eos": False}, {"prompts": {"query": "q"}}, {"attention": "causal"})
    ]
    others += [model.keep_first_layers(2), Embedder.load(copy, dtype="bfloat16")]
    (copy / "tokenizer_config.json").write_text(
        json.dumps(json.loads((copy / "tokenizer_config.json").read_text()) | {"add_bos_token": True})
    )
    others.append(Embedder.load(copy))
    tiny.write_folder(copy, "qwen3", seed=1)
    others.append(Embedder.load(copy))
    assert len({digest, *map(compute_model_digest, others)}) == len(others) + 1
