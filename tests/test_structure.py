"""The structure of the package: imports point downward, public names have docstrings, and files stay short."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxembed"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES, MAX_README_LINES = 400, 120
SHARED_NAMES = ("ABOUT",)  # what a command's --help says below its options


def read_layers() -> list[str]:
    """Return the layers of the package, top first, as the design page lists them in its line `commands > cli > ...`."""
    pages = [page.read_text() for page in (ROOT / "docs").rglob("design.md")]
    (order,) = re.findall(r"commands(?:\s+>\s+\w+)+", "\n".join(pages).replace("`", ""))
    return re.findall(r"\w+", order)


def find_layer(parts: tuple[str, ...]) -> str:
    """Return the layer of a module, given the parts of its dotted name after `jaxembed`."""
    name = parts[0] if parts else "__init__"
    is_command = name in ("__init__", "__main__") or parts == ("data", "__main__")
    return name if name in read_layers() and not is_command else "commands"


def iter_imports(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield line and module, as parts after `jaxembed`, of every import of the package in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from jaxembed import cli` imports the module jaxembed.cli.
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            names = [f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module]
        for name in names:
            if name.split(".")[0] == "jaxembed":
                yield node.lineno, tuple(name.split(".")[1:])


def find_upward_imports(files: list[Path]) -> list[str]:
    layers = read_layers()
    found = []
    for path in files:
        own = find_layer(path.relative_to(PACKAGE).with_suffix("").parts)
        for line, parts in iter_imports(path):
            if layers.index(find_layer(parts)) < layers.index(own):
                found.append(f"{path.relative_to(ROOT)}:{line}: {own} imports jaxembed.{'.'.join(parts)}")
    return found


def test_every_folder_has_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(read_layers())


def test_imports_point_downward() -> None:
    assert find_upward_imports(FILES) == []


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path.parent)
    monkeypatch.setattr(f"{__name__}.read_layers", lambda: ["commands", "cli", "runs", "model", "errors"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "layers.py").write_text("from jaxembed.errors import UserError\nimport jaxembed.runs.train\n")
    found = find_upward_imports([tmp_path / "model" / "layers.py"])
    assert len(found) == 1 and "layers.py:2: model imports jaxembed.runs.train" in found[0]


def iter_undocumented(path: Path) -> Iterator[str]:
    """Yield the public modules, classes, functions, and methods of a file that have no docstring."""

    def visit(node: ast.AST, name: str) -> Iterator[str]:
        if not ast.get_docstring(node):  # type: ignore[arg-type]
            yield name
        for child in ast.iter_child_nodes(node):
            is_definition = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if is_definition and not child.name.startswith("_") and not isinstance(node, ast.FunctionDef):
                yield from visit(child, f"{name}.{child.name}")

    yield from visit(ast.parse(path.read_text()), str(path.relative_to(ROOT)))


def test_public_names_have_docstrings() -> None:
    files = [path for path in FILES if path.name != "__init__.py" or path.read_text()]
    assert [name for path in files for name in iter_undocumented(path)] == []


def find_shared_names(files: list[Path]) -> dict[str, list[str]]:
    """Return the classes, with or without a leading underscore, and the constants that several files define."""
    places: dict[str, set[str]] = {}
    for path in files:
        tree = ast.parse(path.read_text())
        names = [node.name.lstrip("_") for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            bound = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            names += [name for name in bound if len(name) > 1 and name[:1] != "_" and name != name.lower()]
        for name in names:
            places.setdefault(name, set()).add(str(path))
    return {name: sorted(found) for name, found in places.items() if len(found) > 1 and name not in SHARED_NAMES}


def test_a_name_has_one_meaning(tmp_path: Path) -> None:
    assert find_shared_names(FILES) == {}
    (tmp_path / "a.py").write_text("class Job: ...\nMAX_ROWS, log = 2, None")
    (tmp_path / "b.py").write_text("class _Job: ...\nMAX_ROWS: int = 3\nlog = None\ndef f():\n    MAX_TEXTS = 1")
    assert set(find_shared_names([tmp_path / "a.py", tmp_path / "b.py"])) == {"Job", "MAX_ROWS"}


def test_files_are_short() -> None:
    others = [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in [*FILES, *others]}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def iter_parameters(function: ast.FunctionDef) -> Iterator[str]:
    """Yield the parameters of a function, without self and cls."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    yield from (argument.arg for argument in named if argument and argument.arg not in ("self", "cls"))


def test_functions_with_many_parameters_say_why() -> None:
    functions = [
        (path, node) for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]
    many = {(path, node.name): ast.get_docstring(node) for path, node in functions if len([*iter_parameters(node)]) > 6}
    assert {PACKAGE / "hub" / "embedder.py", PACKAGE / "training" / "step.py"} <= {path for path, _ in many}
    reason = re.compile(r"(more than six|seven|eight) (parameters|arguments)")
    assert [place for place, docstring in many.items() if not reason.search(" ".join((docstring or "").split()))] == []


def test_the_tests_that_the_docs_name_exist() -> None:
    page = (ROOT / "docs" / "reference" / "checks.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", page)
    assert len(named) > 50
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert missing == []


def test_no_message_names_a_package_that_anyone_could_register() -> None:
    """Until the package is published, extras are installed from the checkout: pip install '.[eval]'."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("*.py"), *(ROOT / "launch").iterdir()]
    assert [path for path in pages if path.is_file() and re.search(r"jaxembed\[|pip install jaxembed", path.read_text())] == []
