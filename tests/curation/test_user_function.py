"""The step `function` in a whole curation: functions that return odd numbers, or end the process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxembed import curate
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError

CODE = """
import sys
def add_nan(row):
    return row | {"x": float("nan"), "y": [float("inf")]}
def leave(row):
    sys.exit(0)
def close(row):
    raise GeneratorExit
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of a user."""
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "functions_of_user.py").write_text(CODE)
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit(0)\n")
    yield
    for name in ("functions_of_user", "leaves_at_once"):
        sys.modules.pop(name, None)


def run(tmp_path: Path, function: str, **keys: Any) -> dict[str, Any]:
    write_jsonl(tmp_path / "a.jsonl", [{"query": "a question", "pos": ["an answer"]}])
    step = {"name": "function", "function": function}
    tree = {"out": str(tmp_path / "out"), "sources": [{"path": str(tmp_path / "a.jsonl")}], "steps": [step], **keys}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return curate.main(curate.make_parser().parse_args([str(tmp_path / "config.yaml")]))


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    run(tmp_path, "functions_of_user.add_nan", metadata=["x", "y"])
    row = json.loads((tmp_path / "out" / "a.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"query": "a question", "pos": ["an answer"], "x": None, "y": [None]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("functions_of_user.leave", r"a.jsonl:1: functions_of_user.leave failed \(SystemExit: 0\)"),
        ("functions_of_user.close", r"a.jsonl:1: functions_of_user.close failed \(GeneratorExit: \)"),
        ("leaves_at_once.check", r"leaves_at_once cannot be imported \(SystemExit: 0\)"),
    ],
)
def test_a_function_that_exits_is_an_error(tmp_path: Path, function: str, message: str) -> None:
    """Otherwise the command would end with the exit code of success, without an output."""
    with pytest.raises(UserError, match=message):
        run(tmp_path, function)
