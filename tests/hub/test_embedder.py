"""Long texts by pieces, and texts that are presented twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxembed import Embedder, cli
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub import embedder
from jaxembed.hub.base import find_base, spec_from_json
from jaxembed.hub.card import Card
from jaxembed.hub.embedder import from_base
from jaxembed.hub.export import export
from jaxembed.model.decoder import Compute

LONG = "the quick brown fox jumps over the lazy dog and the dog sleeps " * 20


@pytest.fixture(scope="module")
def model(base_folder: Callable[[str], Path]) -> Embedder:
    return Embedder.load(base_folder("qwen3"))


@pytest.mark.parametrize(("way", "combine"), [("mean", np.mean), ("max", np.max)])
def test_a_long_text_is_read_to_its_end(model: Embedder, way: str, combine: Callable[..., np.ndarray]) -> None:
    texts = ["short", LONG + "and wakes up", "also short", LONG]
    (pieces,) = model.tokenizer.split_texts([texts[1]], "query: ")
    assert len(pieces) > 2
    together = combine(model.encode(pieces, prompt="query: "), axis=0)
    got = model.encode(texts, prompt="query: ", long_texts=way)
    np.testing.assert_allclose(got[1], together / np.linalg.norm(together), atol=1e-5)
    cut = model.encode(texts, prompt="query: ")
    np.testing.assert_allclose(got[[0, 2]], cut[[0, 2]], atol=1e-5)
    assert np.array_equal(cut[1], cut[3])  # they differ past the cut only
    assert np.abs(got[1] - got[3]).max() > 1e-3
    narrow = model.encode(texts, prompt="query: ", long_texts=way, dim=8)
    np.testing.assert_allclose(narrow, got[:, :8] / np.linalg.norm(got[:, :8], axis=1, keepdims=True), atol=1e-5)


def test_a_program_of_one_cpu_takes_the_layers_where_they_lie(model: Embedder, base_folder: Callable[[str], Path]) -> None:
    """Each layer's matrices are arguments of their own, which are not copied, and the vectors the same."""
    one = Embedder.load(base_folder("qwen3"), mesh=make_mesh(devices=jax.devices()[:1]))
    stacked = one.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    apart = [of_layer["mlp"]["up"]["kernel"] for of_layer in one._by_layer["decoder"]["layers"]]
    begins = [x.unsafe_buffer_pointer() - stacked.unsafe_buffer_pointer() for x in apart]
    assert begins == [layer * stacked[0].nbytes for layer in range(one.model.decoder.layers)]
    for other in (model, one.first_layers(one.model.decoder.layers), one.with_params(one.params)):
        np.testing.assert_allclose(other.encode([LONG, "short"]), one.encode([LONG, "short"]), atol=1e-5)
    shortened = one.first_layers(1)
    assert np.abs(shortened.encode(["short"]) - one.encode(["short"])).max() > 1e-3


def test_a_model_split_over_devices_gives_the_same_vectors(model: Embedder, base_folder: Callable[[str], Path]) -> None:
    """As `--fsdp` loads it for the commands; where its width does not split, that is told."""
    parser = cli.parser("encode", "")
    cli.add_model(parser)
    folder = str(base_folder("qwen3"))
    args = parser.parse_args([folder, "--fsdp", "4"])
    split = cli.load_model(args.model, **cli.model_options(args))
    part = split.params["decoder"]["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data
    assert part.shape[1] == model.model.decoder.width // 4
    np.testing.assert_allclose(split.encode([LONG, "short"]), model.encode([LONG, "short"]), atol=1e-5)
    with pytest.raises(UserError, match=r"^mesh: fsdp is 3, which does not divide the model's embed"):
        Embedder.load(folder, mesh=make_mesh(2, 3))


def test_short_texts_beside_a_long_one_keep_their_vectors_and_order(
    base_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "ON_CPU", 256)  # so that few texts fill rows of several lengths
    read, fill_rows = [], embedder.fill_rows
    monkeypatch.setattr(embedder, "fill_rows", lambda *given: read.append(given[-1]) or fill_rows(*given))
    base = find_base(str(base_folder("qwen3")))
    model = from_base(base, EmbeddingSpec(attention="causal", pooling="mean", max_length=128), Compute(), make_mesh(1))
    texts = [f"fox {i} " + "sleeps " * (i % 7) for i in range(120)]
    texts.insert(50, LONG)
    got = model.encode(texts)
    assert {row_length for _, row_length in read} == {64, 128}
    for i in (0, 49, 50, 51, 120):
        np.testing.assert_allclose(got[i], model.encode([texts[i]])[0], atol=1e-5)


def test_an_unknown_way_is_refused(model: Embedder) -> None:
    with pytest.raises(UserError, match="long_texts is 'middle'; expected cut, mean, max"):
        model.encode(["x"], long_texts="middle")


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_echo_lets_the_second_copy_see_the_first(base_folder: Callable[[str], Path], pooling: str) -> None:
    """Under a causal mask the vector is that of the second copy's tokens among all of them."""
    base = find_base(str(base_folder("qwen3")))
    spec = EmbeddingSpec(attention="causal", pooling=pooling, max_length=64, echo="Say: {text}\nAgain: {text}")
    echo = from_base(base, spec, Compute(), make_mesh(1))
    text = "the fox sleeps"
    plain = from_base(base, EmbeddingSpec(attention="causal", pooling=pooling, max_length=64), Compute(), make_mesh(1))
    (ours,), (theirs,) = echo.tokenizer([text], [""]).ids, plain.tokenizer([f" {text}"], [f"Say: {text}\nAgain:"]).ids
    assert ours.tolist() == theirs.tolist()
    np.testing.assert_allclose(echo.encode([text]), plain.encode([f" {text}"], prompt=f"Say: {text}\nAgain:"), atol=1e-5)
    assert np.abs(echo.encode([text]) - plain.encode([text])).max() > 1e-2


def test_an_echo_is_not_exported(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = find_base(str(base_folder("qwen3")))
    spec = EmbeddingSpec(max_length=64, echo="{text} {text}")
    with pytest.raises(UserError, match=r"model\.echo presents a text twice"):
        export(from_base(base, spec, Compute(), make_mesh(1)), tmp_path / "out", "float32", Card("echo", "base"))
    with pytest.raises(UserError, match=r"model\.echo pools the second copy .*include_instruction=false"):
        from_base(base, spec.replace(include_instruction=True), Compute(), make_mesh(1))
    with pytest.raises(UserError, match=r"echo must name \{text\} twice and end with it"):
        spec_from_json({"echo": "{text} once"}, "FILE")
