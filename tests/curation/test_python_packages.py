"""Training pairs made from small packages that are written for the test, and from the standard library's json."""

import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxembed.curation import python_packages
from jaxembed.curation.near_duplicates import NearCopies
from jaxembed.curation.python_packages import extract
from jaxembed.errors import UserError

Write = Callable[[str, str], None]


def function(name: str, docstring: str, seed: int) -> str:
    """The source of a function whose body no other seed resembles."""
    draw = random.Random(seed)
    lines = [f"    v{draw.randrange(10**6)} = w{draw.randrange(10**6)}({draw.randrange(10**6)})" for _ in range(6)]
    return f'def {name}(x):\n    """{docstring}"""\n' + "\n".join(lines) + "\n    return x\n\n"


def module(first: int, last: int) -> str:
    return "".join(function(f"f{i}", f"Does the thing of number {i}.", i) for i in range(first, last))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file of a package that can be found, and that would stop the test if it were imported."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write_file(place: str, source: str) -> None:
        path = site / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
        (path.parent / "__init__.py").write_text("raise SystemExit('imported')\n")

    return write_file


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_pair_is_the_first_paragraph_and_the_code_without_docstrings(write: Write, tmp_path: Path) -> None:
    write(
        "alpha/a.py",
        'class A:\n  def f(self):\n    r"""Adds one\n      to  two.\n\n      More.\n    """\n    return 1 + 2\n',
    )
    (pair,) = lines(extract(["alpha"], None, 0, tmp_path / "cache") / "train.jsonl")
    assert pair == {"query": "Adds one to two.", "pos": ["def f(self):\n    return 1 + 2"], "neg": []}
    assert "alpha" not in sys.modules


@pytest.mark.parametrize(
    ("place", "source", "reason"),
    [
        ("alpha/a.py", "def f():\n    return 1", "no docstring"),
        ("alpha/a.py", "def f():\n    'Too short.'\n    return 1", "docstring says too little"),
        ("alpha/a.py", "def f():\n    'Args: x, which is the number'\n    return 1", "docstring says too little"),
        ("alpha/a.py", f"def f():\n    '{'many words ' * 50}'\n    return 1", "docstring too long"),
        ("alpha/a.py", "def f():\n    'Must be defined by a child class.'\n    raise NotImplementedError", "no body"),
        ("alpha/a.py", "@overload\ndef f():\n    'One of several signatures.'\n    return 1", "overload"),
        ("alpha/a.py", "def f(:", "file does not parse"),
        ("alpha/tests/a.py", module(10, 11), None),
        ("alpha/test_a.py", module(10, 11), None),
    ],
)
def test_what_says_nothing_makes_no_pair(write: Write, tmp_path: Path, place: str, source: str, reason: str) -> None:
    write("alpha/good.py", module(0, 2))
    write(place, source)
    folder = extract(["alpha"], None, 1, tmp_path / "cache")
    counts = json.loads((folder / "report.json").read_text())["total"]
    assert counts["pairs"] == 2
    assert [key for key in counts if key.startswith("dropped")] == ([f"dropped: {reason}"] if reason else [])


def test_nested_docstrings_and_lone_surrogates_do_not_survive(write: Write, tmp_path: Path) -> None:
    nested = "    def inner():\n        'An inner docstring here.'\n    return inner"
    write("alpha/a.py", f"def f():\n    'Makes a function \\ud800 of none.'\n{nested}\n")
    (pair,) = lines(extract(["alpha"], None, 0, tmp_path / "cache") / "train.jsonl")
    assert pair["query"] == "Makes a function ? of none."
    assert pair["pos"] == ["def f():\n\n    def inner():\n        pass\n    return inner"]


def test_held_out_sets_are_beir_folders_apart_from_training(write: Write, tmp_path: Path) -> None:
    write("alpha/a.py", module(0, 30))
    write("beta/b.py", module(30, 35))
    folder = extract(["alpha"], "beta", 10, tmp_path / "cache")
    train = {pair["query"] for pair in lines(folder / "train.jsonl")}
    queries = {name: lines(folder / name / "queries.jsonl") for name in ("functions", "package")}
    texts = {name: {row["text"] for row in rows} for name, rows in queries.items()}
    assert (len(train), len(texts["functions"]), len(texts["package"])) == (20, 10, 5)
    assert len(train | texts["functions"] | texts["package"]) == 35
    for name, rows in queries.items():
        corpus = {row["_id"]: row["text"] for row in lines(folder / name / "corpus.jsonl")}
        header, *qrels = [line.split("\t") for line in (folder / name / "qrels/test.tsv").read_text().splitlines()]
        assert header == ["query-id", "corpus-id", "score"]
        assert [(query, score) for query, _, score in qrels] == [(row["_id"], "1") for row in rows]
        assert sorted(document for _, document, _ in qrels) == sorted(corpus)
        number = rows[0]["text"].split()[-1].rstrip(".")
        assert corpus[qrels[0][1]].startswith(f"def f{number}(x)")


def test_of_copies_only_the_held_out_one_is_kept(write: Write, tmp_path: Path) -> None:
    write("alpha/a.py", module(0, 20) + function("renamed", "A near copy under a new name.", 100))
    write("alpha/b.py", function("other", "does the THING of number 101", 102))
    write("beta/b.py", module(100, 102))
    folder = extract(["alpha", "beta"], "beta", 5, tmp_path / "cache")
    kept = (folder / "train.jsonl").read_text() + (folder / "functions/corpus.jsonl").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert "renamed" not in kept and "other" not in kept
    assert report["packages"]["beta"]["pairs"] == 2
    alpha = report["packages"]["alpha"]
    assert (alpha["dropped: code copies another"], alpha["dropped: docstring equals another"]) == (1, 1)


def test_near_copies_are_told_from_siblings() -> None:
    codes = NearCopies()
    code = module(0, 1)
    assert codes.add(code)
    assert not codes.add(code)
    assert not codes.add(code.replace("def f0", "def g").replace("return x", "return y"))
    assert codes.add(module(1, 2))
    siblings = "def {}(self):\n    return self.tk.getint(self.tk.call('winfo', '{}', self._w))"
    assert codes.add(siblings.format("winfo_width", "width"))
    assert codes.add(siblings.format("winfo_height", "height"))


def test_the_same_sources_give_the_same_bytes_with_and_without_a_pool(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("alpha/a.py", module(0, 10))
    write("alpha/b.py", module(10, 20))
    one = extract(["alpha"], None, 5, tmp_path / "one")
    monkeypatch.setattr(python_packages, "FILES_WORTH_A_POOL", 1)
    two = extract(["alpha"], None, 5, tmp_path / "two")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert [str(path) for path in files][-1] == "train.jsonl" and len(files) == 5
    assert one.name == two.name
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)


def test_a_second_call_reads_nothing_and_an_edit_or_an_option_makes_a_new_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("alpha/a.py", module(0, 10))
    first = extract(["alpha"], None, 5, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(python_packages, "_read", None)
        assert extract(["alpha"], None, 5, tmp_path) == first
    assert extract(["alpha"], None, 4, tmp_path) != first
    write("alpha/a.py", module(0, 11))
    assert extract(["alpha"], None, 5, tmp_path) != first


def test_a_killed_extraction_leaves_no_folder(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("alpha/a.py", module(0, 10))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(python_packages, "write_beir", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(["alpha"], None, 5, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert (extract(["alpha"], None, 5, tmp_path / "cache") / "functions/qrels/test.tsv").exists()


def test_absent_packages(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write("alpha/a.py", module(0, 10))
    extract(["alpha", "no-such-package"], None, 5, tmp_path / "cache")
    assert "'no-such-package'" in caplog.text
    for packages, holdout, message in [
        (["alpha"], "absent", "held-out package 'absent' is not installed"),
        (["absent"], None, "none of the packages"),
        (["alpha"], None, "10 pairs found, 10 to hold out"),
    ]:
        with pytest.raises(UserError, match=message):
            extract(packages, holdout, 10, tmp_path / "cache")


def test_a_package_of_the_standard_library(tmp_path: Path) -> None:
    folder = extract(["json"], None, 3, tmp_path)
    assert any("JSON" in pair["query"] for pair in lines(folder / "train.jsonl"))
    spec = importlib.util.find_spec("json")
    assert spec is not None and spec.origin is not None
    report = json.loads((folder / "report.json").read_text())["packages"]["json"]
    assert report["files"] == len(list(Path(spec.origin).parent.glob("*.py")))
