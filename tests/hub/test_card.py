"""Model cards say what a model is, and nothing about the machine it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.runs import make_config, use_one_device, write_base_and_data
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.hub.card import read_card, shorten_path
from jaxembed.hub.export import export
from jaxembed.hub.export_adapters import export_adapters
from jaxembed.runs.train import train


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/home/me/models/base", "base"),
        ("/home/me/data/*.jsonl", "*.jsonl"),
        ("~/models/base/", "base"),
        ("C:\\models\\base", "base"),
        ("Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B"),
        ("preset:tiny", "preset:tiny"),
        ("data/pairs.jsonl", "data/pairs.jsonl"),
        ("</s>", "</s>"),
        ("Instruct: {instruction}\nQuery:", "Instruct: {instruction}\nQuery:"),
        ("", ""),
    ],
)
def test_absolute_paths_are_shortened(name: str, expected: str) -> None:
    assert shorten_path(name) == expected


def list_mentions(folder: Path, text: str) -> list[str]:
    """Return the files of a folder that contain a text."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes())


def test_exported_folders_contain_no_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_device(monkeypatch)
    root = write_base_and_data(tmp_path / "secret-place")
    config = make_config(root, "run", "train.steps=1", "eval.sets=[]", "model.lora={rank: 2, alpha: 4}", "mesh.data=1")
    train(config)
    model = Embedder.load(root / "run", checkpoint="last")
    card = read_card(root / "run", model.revision)
    export(model, tmp_path / "out", "float32", card)
    assert list_mentions(tmp_path / "out", "secret-place") == []
    # The recipe is still complete.
    recipe = yaml.safe_load(card.recipe)
    assert (card.base, recipe["model"]["base"], recipe["run"]["dir"]) == ("base", "base", "run")
    assert recipe["data"]["sources"][0]["path"] == "pairs.jsonl"
    assert "secret-place" in (root / "run" / "config.yaml").read_text()
    assert "trained with jaxembed from `base`, step 1" in (tmp_path / "out" / "README.md").read_text()
    # A model that was not trained is not said to be.
    base = Embedder.load(root / "base")
    monkeypatch.chdir(root / "base")
    export(base, tmp_path / "untrained", "float32", read_card(Path("."), base.revision))
    text = (tmp_path / "untrained" / "README.md").read_text()
    assert "# base\n" in text and f"exported with jaxembed (weights `{base.revision}`)" in text
    # Adapters must name their base, so that they can be loaded.
    export_adapters(root / "run", tmp_path / "adapters", "last")
    assert list_mentions(tmp_path / "adapters", "secret-place") == ["adapter_config.json"]


def test_sources_do_not_replace_the_prompts_of_both_sides() -> None:
    """Configs that are given refuse these names; runs of earlier versions may have them."""
    instructions = {"first": ("Find it", "Represent it"), "query": ("Other", ""), "document": ("Other", "Other")}
    prompts = EmbeddingSpec(instruction_template="{instruction}: ").add_source_prompts(instructions).prompts
    assert prompts == {"query": "Find it: ", "document": "Represent it: ", "first": "Find it: "}
