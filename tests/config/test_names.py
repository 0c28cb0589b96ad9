"""Equal and reserved names of sources and held-out sets are refused; recorded configs are read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxembed.config import load_config, parse_config, read_run_config
from jaxembed.errors import UserError


def make_tree(*sources: Any, sets: Any = (), stages: Any = ()) -> dict[str, Any]:
    data: dict[str, Any] = {"sources": [source if isinstance(source, dict) else {"path": source} for source in sources]}
    tree: dict[str, Any] = {"model": {"base": "preset:tiny"}, "data": data, "eval": {"sets": list(sets)}}
    return tree | ({"stages": list(stages)} if stages else {})


def write_config(folder: Path, tree: Any) -> Path:
    (folder / "c.yaml").write_text(json.dumps(tree))
    return folder / "c.yaml"


REFUSED = [
    (
        make_tree("a/train.jsonl", "b/train.jsonl"),
        r"data\.sources\.1 \(b/train\.jsonl\) is named 'train', like data\.sources\.0 \(a/train\.jsonl\), .*"
        r"Name it, such as data\.sources\.1\.name: b-train\.$",
    ),
    (
        make_tree("a/*.parquet", "b/*.parquet"),
        r"sources\.1 \(b/\*\.parquet\) is named '\*', .* data\.sources\.1\.name: b-source\.$",
    ),
    (make_tree("a.jsonl", {"path": "b.jsonl", "name": "a"}), r"data\.sources\.1 \(b\.jsonl\) is named 'a'"),
    (make_tree("a.jsonl", "a.jsonl"), r"data\.sources\.1 \(a\.jsonl\) is named 'a', like data\.sources\.0"),
    (make_tree("x/document.jsonl"), r"data\.sources\.0 is named 'document', which is reserved .*name: x-document\.$"),
    (make_tree({"path": "a", "name": "query"}), r"data\.sources\.0 is named 'query', which is reserved"),
    (
        make_tree("a", sets=[{"name": "s", "path": "x"}, {"name": "s", "path": "y"}]),
        r"eval\.sets\.1\.name is 's', like eval\.sets\.0\.name, but scores are stored by name",
    ),
    (
        make_tree("a/one", stages=[{"train": {"steps": 1}}, {"data": {"sources": [{"path": "b/one"}]}, "train": {"steps": 1}}]),
        r"stages\.1\.data\.sources\.0 \(b/one\) is named 'one', like stages\.0\.data\.sources\.0 \(a/one\)",
    ),
]


@pytest.mark.parametrize(("tree", "message"), REFUSED)
def test_equal_and_reserved_names_are_refused(tmp_path: Path, tree: Any, message: str) -> None:
    path = write_config(tmp_path, tree)
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(("tree", "message"), REFUSED)
def test_recorded_configs_are_still_read(tmp_path: Path, tree: Any, message: str) -> None:
    recorded = parse_config(tree, "c.yaml")
    (tmp_path / "config.yaml").write_text(recorded.dump())
    assert read_run_config(tmp_path / "config.yaml") == recorded


def test_different_names_are_accepted(tmp_path: Path) -> None:
    stages = [{"train": {"steps": 1}}, {"data": {"sources": [{"path": "a/one"}, {"path": "c"}]}, "train": {"steps": 1}}]
    sets = [{"name": "query", "path": "x"}, {"name": "t", "path": "x"}]
    tree = make_tree("a/one", {"path": "b/one", "name": "two"}, sets=sets, stages=stages)
    assert len(load_config(write_config(tmp_path, tree)).stages) == 2


@pytest.mark.parametrize("key", ["row_length", "max_length", "hard_negatives"])
def test_absurd_sizes_are_refused(tmp_path: Path, key: str) -> None:
    tree = make_tree("a")
    tree["data"] |= {key: 2_000_000_000}
    with pytest.raises(UserError, match=rf"data\.{key} is 2000000000 \(expected a number that is at most \d+\)\.$"):
        load_config(write_config(tmp_path, tree))
