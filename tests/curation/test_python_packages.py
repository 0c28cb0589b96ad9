"""Pairs of small packages that are written for the test, and of the standard library's json."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import ENV
from helpers.packages import make_function, make_module
from jaxembed.curation import python_functions, python_packages
from jaxembed.curation.python_packages import write_package_pairs
from jaxembed.data.__main__ import main, make_parser
from jaxembed.data.scratch import SCRATCH_PREFIX
from jaxembed.errors import UserError

WriteFile = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Write a file of a package that can be found, and that would stop the test if it were imported."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write_file(relative_path: str, source: str) -> None:
        path = site / relative_path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
        (path.parent / "__init__.py").write_text("raise SystemExit('imported')\n")

    return write_file


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_packages(*args: str) -> dict[str, Any]:
    return main(make_parser().parse_args(["packages", *args]))


def test_pair_is_the_first_paragraph_and_the_code_without_docstrings(write: WriteFile, tmp_path: Path) -> None:
    write(
        "alpha/a.py",
        'class A:\n  def f(self):\n    r"""Adds one\n      to  two.\n\n      More.\n    """\n    return 1 + 2\n',
    )
    write_package_pairs(tmp_path / "out", ["alpha"], None, 0)
    (pair,) = read_lines(tmp_path / "out/train.jsonl")
    assert pair == {"query": "Adds one to two.", "pos": ["def f(self):\n    return 1 + 2"], "neg": []}
    assert "alpha" not in sys.modules


@pytest.mark.parametrize(
    ("relative_path", "source", "reason"),
    [
        ("alpha/a.py", "def f():\n    return 1", "no docstring"),
        ("alpha/a.py", "def f():\n    'Too short.'\n    return 1", "docstring says too little"),
        ("alpha/a.py", "def f():\n    'Args: x, which is the number'\n    return 1", "docstring says too little"),
        ("alpha/a.py", f"def f():\n    '{'many words ' * 50}'\n    return 1", "docstring too long"),
        ("alpha/a.py", "def f():\n    'Must be defined by a child class.'\n    raise NotImplementedError", "no body"),
        ("alpha/a.py", "@overload\ndef f():\n    'One of several signatures.'\n    return 1", "overload"),
        ("alpha/a.py", "def f(:", "file does not parse"),
        ("alpha/tests/a.py", make_module(10, 11), None),
        ("alpha/test_a.py", make_module(10, 11), None),
    ],
)
def test_functions_without_a_useful_docstring_make_no_pair(
    write: WriteFile, tmp_path: Path, relative_path: str, source: str, reason: str
) -> None:
    write("alpha/good.py", make_module(0, 2))
    write(relative_path, source)
    write_package_pairs(tmp_path / "out", ["alpha"], None, 1)
    counts = json.loads((tmp_path / "out/report.json").read_text())["total"]
    assert counts["pairs"] == 2
    assert [key for key in counts if key.startswith("dropped")] == ([f"dropped: {reason}"] if reason else [])


def test_nested_docstrings_are_removed_and_lone_surrogates_replaced(write: WriteFile, tmp_path: Path) -> None:
    nested = "    def inner():\n        'An inner docstring here.'\n    return inner"
    write("alpha/a.py", f"def f():\n    'Makes a function \\ud800 of none.'\n{nested}\n")
    write_package_pairs(tmp_path / "out", ["alpha"], None, 0)
    (pair,) = read_lines(tmp_path / "out/train.jsonl")
    assert pair["query"] == "Makes a function ? of none."
    assert pair["pos"] == ["def f():\n\n    def inner():\n        pass\n    return inner"]


def test_held_out_sets_are_beir_folders_that_share_nothing_with_training(write: WriteFile, tmp_path: Path) -> None:
    write("alpha/a.py", make_module(0, 30))
    write("beta/b.py", make_module(30, 35))
    out = tmp_path / "out"
    sizes = write_package_pairs(out, ["alpha"], "beta", 10)
    train = {pair["query"] for pair in read_lines(out / "train.jsonl")}
    queries = {name: read_lines(out / name / "queries.jsonl") for name in ("functions", "package")}
    texts = {name: {row["text"] for row in rows} for name, rows in queries.items()}
    assert sizes == {"train": 20, "functions": 10, "package": 5}
    assert (len(train), len(texts["functions"]), len(texts["package"])) == (20, 10, 5)
    assert len(train | texts["functions"] | texts["package"]) == 35
    for name, rows in queries.items():
        corpus = {row["_id"]: row["text"] for row in read_lines(out / name / "corpus.jsonl")}
        header, *qrels = [line.split("\t") for line in (out / name / "qrels/test.tsv").read_text().splitlines()]
        assert header == ["query-id", "corpus-id", "score"]
        assert [(query, score) for query, _, score in qrels] == [(row["_id"], "1") for row in rows]
        assert sorted(document for _, document, _ in qrels) == sorted(corpus)
        number = rows[0]["text"].split()[-1].rstrip(".")
        assert corpus[qrels[0][1]].startswith(f"def f{number}(x)")


def test_of_duplicates_only_the_held_out_one_is_kept(write: WriteFile, tmp_path: Path) -> None:
    write("alpha/a.py", make_module(0, 20) + make_function("renamed", "A near copy under a new name.", 100))
    write("alpha/b.py", make_function("other", "does the THING of number 101", 102))
    write("beta/b.py", make_module(100, 102))
    out = tmp_path / "out"
    write_package_pairs(out, ["alpha", "beta"], "beta", 5)
    kept = (out / "train.jsonl").read_text() + (out / "functions/corpus.jsonl").read_text()
    report = json.loads((out / "report.json").read_text())
    assert "renamed" not in kept and "other" not in kept
    assert report["packages"]["beta"]["pairs"] == 2
    alpha = report["packages"]["alpha"]
    assert (alpha["dropped: code copies another"], alpha["dropped: docstring equals another"]) == (1, 1)


def test_same_packages_give_the_same_bytes_with_and_without_workers(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("alpha/a.py", make_module(0, 10))
    write("alpha/b.py", make_module(10, 20))
    write_package_pairs(tmp_path / "one", ["alpha"], None, 5)
    monkeypatch.setattr(python_functions, "MIN_FILES_FOR_WORKERS", 1)
    write_package_pairs(tmp_path / "two", ["alpha"], None, 5)
    files = read_files(tmp_path / "one")
    assert len(files) == 5 and "train.jsonl" in files
    assert read_files(tmp_path / "two") == files


def test_command_skips_a_folder_that_is_up_to_date_and_keeps_any_other(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("alpha/a.py", make_module(0, 10))
    out = tmp_path / "new" / "out"
    arguments = (str(out), "--packages", "alpha", "--holdout-package", "", "--holdout-functions")
    report = run_packages(*arguments, "5")
    assert report == {"out": str(out), "train": 5, "functions": 5, "package": 0}
    before = read_files(out)
    monkeypatch.setattr(python_packages, "parse_files", None)
    assert run_packages(*arguments, "5") == report
    with pytest.raises(UserError, match=r"out: holds pairs of other inputs \(different: holdout_functions\)\. Remove it"):
        run_packages(*arguments, "4")
    write("alpha/a.py", make_module(0, 11))
    with pytest.raises(UserError, match=r"\(different: files\)"):
        run_packages(*arguments, "5")
    assert read_files(out) == before and [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match="already exists and holds no pairs of Python packages"):
        run_packages(str(tmp_path / "site"), "--packages", "alpha", "--holdout-package", "")


KILLED = """
import os, runpy, signal
from jaxembed.curation import python_packages
python_packages.write_beir = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_module("jaxembed.data", run_name="__main__", alter_sys=True)
"""


def test_kill_leaves_no_folder_and_the_command_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["packages", str(out), "--packages", "json", "--holdout-package", "", "--holdout-functions", "3"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=ENV, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name.startswith(SCRATCH_PREFIX) for path in tmp_path.iterdir()] == [True]
    assert main(make_parser().parse_args(arguments))["functions"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "functions/qrels/test.tsv").exists()


def test_failed_write_leaves_nothing(write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("alpha/a.py", make_module(0, 10))

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(python_packages, "write_beir", fail)
    with pytest.raises(UserError, match=r"out: not written \(No space left on device\)\. Free space"):
        write_package_pairs(tmp_path / "out", ["alpha"], None, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_absent_packages_are_skipped_unless_held_out(
    write: WriteFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write("alpha/a.py", make_module(0, 10))
    write_package_pairs(tmp_path / "out", ["alpha", "no-such-package"], None, 5)
    assert "'no-such-package'" in caplog.text
    for packages, holdout, message in [
        (["alpha"], "absent", "--holdout-package: 'absent' is not installed"),
        (["absent"], None, "--packages: none of absent is installed"),
        (["alpha"], None, r"no pair is left to train on \(10 pairs, 10 held out\)"),
    ]:
        with pytest.raises(UserError, match=message):
            write_package_pairs(tmp_path / "other", packages, holdout, 10)


def test_package_of_the_standard_library(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_package_pairs(out, ["json"], None, 3)
    assert any("JSON" in pair["query"] for pair in read_lines(out / "train.jsonl"))
    spec = importlib.util.find_spec("json")
    assert spec is not None and spec.origin is not None
    report = json.loads((out / "report.json").read_text())["packages"]["json"]
    assert report["files"] == len(list(Path(spec.origin).parent.glob("*.py")))
