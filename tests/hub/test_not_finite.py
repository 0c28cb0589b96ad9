"""Weights and vectors that are not finite are refused by every command, in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import tiny
from helpers.commands import run_command
from jaxembed import Embedder
from jaxembed.errors import UserError
from jaxembed.files import format_json, write_json
from jaxembed.hub import export as export_module
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.export_nv_embed import export_nv_embed
from jaxembed.hub.merging import merge_models
from jaxembed.hub.parity import Parity, compare_vectors

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base with one weight that is NaN."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("broken") / "base", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("error", "cosine", "passes"), [(0.0, 1.0, True), (1e-3, 1.0, False), (math.nan, math.nan, False), (math.inf, 1.0, False)]
)
def test_nan_never_passes(error: float, cosine: float, passes: bool) -> None:
    assert Parity(error, 1e-4, cosine).passes is passes


def test_comparison_of_nan_does_not_pass() -> None:
    vectors = np.full((2, 3), np.nan, np.float32)
    assert not compare_vectors(vectors, vectors, 1e-4).passes


def test_encode_and_latent_weights_refuse_nan(broken: Path) -> None:
    with pytest.raises(UserError, match=r"^encode: the vector of text 0 is not finite \(NaN or infinity\)"):
        Embedder.load(broken).encode(tiny.TEXTS)


def test_exports_and_merges_refuse_nan(broken: Path, base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    message = r"^layers\.1\.mlp\.up_proj\.weight: these weights of the model are not finite"
    with pytest.raises(UserError, match=message):
        export(Embedder.load(broken), tmp_path / "out", "float32", Card("nan", "base"))
    merged, card = merge_models([str(broken), str(base_folder("qwen3"))], [0.5, 0.5], "soup", "merged")
    with pytest.raises(UserError, match=message):
        export(merged, tmp_path / "out", "float32", card)
    assert list(tmp_path.iterdir()) == []


def test_infinite_weights_of_nv_embed_are_refused(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = Embedder.load(base_folder("mistral"))
    infinite = model.with_params(jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), model.params))
    with pytest.raises(UserError, match=r"not finite|cannot represent"):
        export_nv_embed(infinite, tmp_path / "out", "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_vectors_are_nan_is_not_written(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = export_module.encode_probes_torch

    def encode_nan(*args: Any, **options: Any) -> np.ndarray:
        return np.full_like(encode(*args, **options), np.nan)

    monkeypatch.setattr(export_module, "encode_probes_torch", encode_nan)
    with pytest.raises(UserError, match="not written, because the exported vectors differ from the model's by nan"):
        export(Embedder.load(base_folder("qwen3")), tmp_path / "out", "float32", Card("nan", "base"))
    assert list(tmp_path.iterdir()) == []


def test_commands_end_in_one_line(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a text\n")
    for arguments in (
        ["jaxembed.export", str(broken), str(tmp_path / "out")],
        ["jaxembed.merge", str(tmp_path / "out"), str(broken), str(broken)],
        ["jaxembed.encode", str(broken), str(tmp_path / "in.txt"), str(tmp_path / "out.npy")],
    ):
        done = run_command(*arguments)
        assert done.returncode == 2, arguments
        assert done.stdout == "" and "not finite" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": [1.5, math.inf], "c": {"d": -math.inf, "e": "text", "f": True}}
    expected = {"a": None, "b": [1.5, None], "c": {"d": None, "e": "text", "f": True}}
    write_json(tmp_path / "a.json", value)
    for text in (format_json(value), (tmp_path / "a.json").read_text()):
        assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == expected
