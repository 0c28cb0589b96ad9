"""Settings that were removed: the error names what to write instead, and runs that recorded them are still read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxembed.config import load_config, read_run_config
from jaxembed.errors import UserError

COMMAND = "Run 'python -m jaxembed.data packages data/packages'"


def write_config(folder: Path, data: dict[str, Any], **sections: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": "preset:tiny"}, "data": data, **sections}))
    return path


@pytest.mark.parametrize(
    ("data", "sets", "message"),
    [
        (
            {"sources": [{"path": "python_packages"}], "python_packages": {"packages": ["json"]}},
            [],
            f"data.sources.0.path: 'python_packages' is no longer a source. {COMMAND} and set path: data/packages/train.jsonl.",
        ),
        (
            {"sources": [{"path": "x", "format": "python_packages"}]},
            [],
            f"data.sources.0.format: 'python_packages' is no longer a source. {COMMAND} and set path: "
            "data/packages/train.jsonl, without format.",
        ),
        (
            {"sources": [{"path": "a.jsonl"}]},
            [{"name": "held", "path": "python_packages:package"}],
            f"eval.sets.0.path: 'python_packages:package' is no longer a held-out set. {COMMAND} and set path: "
            "data/packages/package.",
        ),
        (
            {"sources": [{"path": "a.jsonl"}], "python_packages": {"holdout_package": None}},
            [],
            f"unknown key data.python_packages. Its keys are now options of a command. {COMMAND} (--packages, "
            "--holdout-package, --holdout-functions) and remove the section.",
        ),
    ],
)
def test_config_that_names_python_packages_fails_with_the_command_to_run(
    tmp_path: Path, data: dict[str, Any], sets: list[dict[str, Any]], message: str
) -> None:
    path = write_config(tmp_path, data, eval={"sets": sets})
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {message}"


def test_recorded_run_on_python_packages_reads_like_one_on_the_written_files(tmp_path: Path) -> None:
    data = {"sources": [{"path": "python_packages", "instructions": ["Find it"]}], "python_packages": {"packages": ["json"]}}
    sets = [{"name": "held", "path": "python_packages:functions"}]
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}, "data": {"sources": [{"path": "python_packages", "name": "b"}]}}]
    config = read_run_config(write_config(tmp_path, data, eval={"sets": sets}, stages=stages))
    assert [source.path for source in config.all_sources()] == ["data/packages/train.jsonl"] * 2
    assert [source.display_name for source in config.all_sources()] == ["python_packages", "b"]
    assert config.eval.sets[0].path == "data/packages/functions"


def test_recorded_run_ignores_the_default_section(tmp_path: Path) -> None:
    data = {"sources": [{"path": "a.jsonl"}], "python_packages": {"packages": ["json"]}}
    config = read_run_config(write_config(tmp_path, data))
    assert config == read_run_config(write_config(tmp_path, {"sources": [{"path": "a.jsonl"}]}))
