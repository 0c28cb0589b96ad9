"""Shipped configs are found by name, and a source may take its keys from an entry of the shipped catalog."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxembed.config import SourceConfig, load_config, shipped
from jaxembed.config.catalog import DOCUMENTATION_KEYS, read_catalog
from jaxembed.config.sections import parse_section
from jaxembed.data.sources import detect_format
from jaxembed.errors import UserError

ROOT = Path(__file__).parents[2]
CATALOG = """
base: &base {columns: {query: question, pos: answer}, license: mit, seen: ["a card"]}
questions:
  <<: *base
  path: "hf:org/questions:train"
  instructions: ["Find it"]
  max_examples: 500
closed: {<<: *base, note: not public}
"""


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ship only one config, one recipe and a small catalog, and work in a folder without files."""
    folder = tmp_path / "shipped"
    (folder / "recipes").mkdir(parents=True)
    (folder / "catalog.yaml").write_text(CATALOG)
    source = [{"catalog": "questions"}]
    for name in ("first.yaml", "recipes/second.yaml"):
        (folder / name).write_text(yaml.safe_dump({"model": {"base": "x"}, "data": {"sources": source}}))
    monkeypatch.setattr(shipped, "find_shipped_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    yield
    shipped._read_once.cache_clear()


def load_sources(folder: Path, *sources: dict[str, Any], overrides: tuple[str, ...] = ()) -> tuple[SourceConfig, ...]:
    (folder / "a.yaml").write_text(yaml.safe_dump({"data": {"sources": list(sources)}}))
    return load_config(folder / "a.yaml", overrides, base="").data.sources


def test_a_source_has_the_keys_of_its_catalog_entry(catalog: None, tmp_path: Path) -> None:
    own = {"catalog": "questions", "name": "mine", "columns": {"query": "q"}, "max_examples": 7}
    entry, changed = load_sources(tmp_path, {"catalog": "questions"}, own)
    columns = {"query": "question", "pos": "answer"}
    keys = {"path": "hf:org/questions:train", "instructions": ["Find it"]}
    assert entry == SourceConfig(name="questions", columns=columns, max_examples=500, **keys)
    assert changed == SourceConfig(name="mine", columns={"query": "q"}, max_examples=7, **keys)
    (moved,) = load_sources(tmp_path, {"catalog": "closed"}, overrides=("data.sources.0.path=my.jsonl",))
    assert (moved.name, moved.path, moved.catalog) == ("closed", "my.jsonl", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qestions", "data.sources.0.catalog: no such entry of the catalog: 'qestions'. Did you mean 'questions'?"),
        ("zzz", "data.sources.0.catalog: no such entry of the catalog: 'zzz'. The entries are in configs/catalog.yaml."),
        (3, "data.sources.0.catalog is 3 (expected a text"),
    ],
)
def test_bad_entries_are_refused(catalog: None, tmp_path: Path, name: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_sources(tmp_path, {"catalog": name})
    assert str(error.value).startswith(f"{tmp_path / 'a.yaml'}: {message}")


def test_an_entry_without_a_path_is_refused_when_its_data_is_opened(catalog: None, tmp_path: Path) -> None:
    (closed,) = load_sources(tmp_path, {"catalog": "closed"})
    message = "catalog entry 'closed' has no path (not public). Set the path of its source to a copy of the data."
    with pytest.raises(UserError) as error:
        detect_format(closed)
    assert str(error.value) == message


def test_configs_are_found_by_name(catalog: None, tmp_path: Path) -> None:
    assert list(shipped.list_shipped_configs()) == ["first", "second"]
    assert [load_config(name).run.dir for name in ("first", "second")] == ["runs/first", "runs/second"]
    (tmp_path / "first").write_text("model: {base: y}\ndata: {sources: [{path: own}]}")  # a file comes first
    assert load_config("first").model.base == "y"
    (tmp_path / "second").mkdir()  # a folder, such as an output, does not
    assert load_config("second").run.dir == "runs/second"
    message = "secnd.yaml: no such config file. Give the path of a YAML file, or the name of a shipped config. Did you mean"
    with pytest.raises(UserError) as error:
        load_config("secnd.yaml")
    assert str(error.value) == f"{message} the shipped config second?"


def test_the_shipped_files_are_those_of_the_checkout() -> None:
    """Configs with the same name are the same: an earlier path links to a recipe."""
    assert shipped.find_shipped_folder() == ROOT / "configs"
    paths = [path for pattern in ("*.yaml", "recipes/*.yaml") for path in (ROOT / "configs").glob(pattern)]
    assert {(path.stem, path.resolve()) for path in paths if path.stem != "catalog"} == {
        (name, path.resolve()) for name, path in shipped.list_shipped_configs().items()
    }


def test_every_entry_of_the_catalog_is_a_source() -> None:
    for name, entry in read_catalog().items():
        keys = {key: value for key, value in entry.items() if key not in DOCUMENTATION_KEYS}
        source = parse_section(SourceConfig, {"path": "x", **keys}, f"configs/catalog.yaml: {name}")
        assert source.display_name not in ("query", "document")
        assert entry.get("note") or "path" in entry, f"{name} has no path, and no note says why"
        assert isinstance(entry["license"], str) and entry["seen"], name
