"""Training pairs from the Python packages of the running environment: docstring -> function, nothing downloaded.

    sources --ast--> (query, code) --one of each group of copies--> train.jsonl | functions/ | package/

`functions/` and `package/` are BEIR folders held out from training: functions drawn at random from every package, and
one package as a whole. No package is imported or run.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import platform
import re
import sysconfig
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from jaxembed.curation.near_duplicates import NearCopies
from jaxembed.data.beir import write_beir
from jaxembed.data.jsonl import write_lines
from jaxembed.errors import UserError

FORMAT = 1  # part of the cache key: raise it when the output of this file changes
PACKAGE_LIMIT = 1000  # functions of the held-out package that are kept
NOT_A_SOURCE = re.compile(r"(^|[/_])(conftest|test|tests|testing)[/_.]|(site|dist)-packages/")
QUERY_CHARACTERS = (15, 500)
QUERY_WORDS = 3
MARKUP = r">>>|\.\. |:(param|type|returns?|rtype|raises)\b"
SECTION = re.compile(rf"{MARKUP}|(Parameters|Args|Arguments|Returns|Examples?|Notes?|Raises)\b\s*(:|-{{3}})")
WORKERS, FILES_WORTH_A_POOL = 2, 200
log = logging.getLogger(__name__)
STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """A Python file: its package, its path, and its place, the path below the folder that holds the package."""

    package: str
    path: Path
    place: str


class Function(NamedTuple):
    """A pair: the first paragraph of a docstring, and the function's code without docstrings; place is file:line."""

    package: str
    place: str
    query: str
    code: str


def extract(packages: Sequence[str], holdout_package: str | None, holdout_functions: int, cache: Path) -> Path:
    """Returns the folder cache/<key> with train.jsonl, functions/, package/ and report.json, made if it is not there.

    `packages` are import names of top-level packages, or "stdlib". `holdout_functions` counts the functions drawn from
    them for functions/; package/ holds up to 1,000 functions of `holdout_package`. A held-out set that is empty has no
    folder. An absent package is skipped with a warning; UserError if it is held out, or if nothing is left.
    """
    names = list(dict.fromkeys([*packages, *([holdout_package] if holdout_package else [])]))
    sources = {name: files for name in names if (files := list(_sources(name)))}
    _check_installed(names, list(sources), holdout_package)
    versions = _versions(list(sources))
    folder = cache / _key(sources, versions, holdout_package, holdout_functions)
    if folder.exists():
        return folder
    functions, counts = _read([source for name in sources for source in sources[name]])
    functions.sort(key=lambda function: function.package != holdout_package)  # of copies, the held-out one is kept
    kept = _without_copies(functions, counts)
    splits = _split(kept, holdout_package, holdout_functions)
    report = {
        "packages": {name: {"version": versions[name], **counts[name]} for name in sources},
        "total": dict(sum(counts.values(), Counter())),
        "splits": {name: len(split) for name, split in splits.items()},
    }
    _publish(folder, splits, report)
    return folder


def _check_installed(names: list[str], installed: list[str], holdout_package: str | None) -> None:
    for name in names:
        if name in installed:
            continue
        if name == holdout_package:
            raise UserError(f"the held-out package {name!r} is not installed; install it or hold out another one")
        log.warning("package %r has no Python sources in this environment: skipped (give its import name)", name)
    if not installed:
        raise UserError(f"none of the packages {names} is installed; give import names, or 'stdlib'")


def _sources(name: str) -> Iterator[Source]:
    """The Python files of a package in sorted order, tests left out; none if the package is absent."""
    for root in _roots(name):
        base = root if name == "stdlib" else root.parent
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            place = path.relative_to(base).as_posix()
            if not NOT_A_SOURCE.search(place):
                yield Source(name, path, place)


def _roots(name: str) -> list[Path]:
    if name == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        return []
    return [Path(root) for root in spec.submodule_search_locations or [spec.origin or ""] if Path(root).exists()]


def _versions(names: list[str]) -> dict[str, str]:
    owners = importlib.metadata.packages_distributions()
    found = {name: {owner: importlib.metadata.version(owner) for owner in owners.get(name, [])} for name in names}
    versions = {name: ", ".join(f"{owner} {found[name][owner]}" for owner in sorted(found[name])) for name in names}
    return {name: version or f"python {platform.python_version()}" for name, version in versions.items()}


def _key(sources: dict[str, list[Source]], versions: dict[str, str], *options: str | int | None) -> str:
    """A hash of all that decides the output; sizes and times of files tell an edited package from the released one."""
    stats = [(s.package, s.place, s.path.stat()) for files in sources.values() for s in files]
    files = [(package, place, stat.st_size, stat.st_mtime_ns) for package, place, stat in stats]
    state = [FORMAT, platform.python_version(), options, versions, files]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def _read(sources: list[Source]) -> tuple[list[Function], dict[str, Counter[str]]]:
    """The functions of all files in order, and per package the counts of files, of functions and of what was left."""
    functions: list[Function] = []
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    parsed = tqdm(_parse_all(sources), "parsing", len(sources), unit="file")
    for source, (found, count) in zip(sources, parsed, strict=True):
        functions += found
        counts[source.package] += count
    return functions, counts


def _parse_all(sources: list[Source]) -> Iterator[tuple[list[Function], Counter[str]]]:
    if len(sources) < FILES_WORTH_A_POOL:
        yield from map(_parse, sources)
        return
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:  # a fork would break JAX's threads
        yield from pool.map(_parse, sources, chunksize=8)


def _parse(source: Source) -> tuple[list[Function], Counter[str]]:
    """The functions of a file that make a pair, and the counts."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's code
            tree = ast.parse(source.path.read_bytes())
        return _pairs(source, tree)
    except (SyntaxError, ValueError, RecursionError):
        return [], Counter({"files": 1, "dropped: file does not parse": 1})


def _pairs(source: Source, tree: ast.Module) -> tuple[list[Function], Counter[str]]:
    functions, count = [], Counter(files=1)
    for node in _functions(tree):
        query = _first_paragraph(ast.get_docstring(node) or "")
        reason = _refusal(node, query)
        count["functions"] += 1
        if reason:
            count[f"dropped: {reason}"] += 1
            continue
        _strip_docstrings(node)
        code = _encodable(ast.unparse(node))
        functions.append(Function(source.package, f"{source.place}:{node.lineno}", query, code))
    return functions, count


def _functions(node: ast.AST) -> Iterator[FunctionNode]:
    """The functions and methods below a node; one nested in another function is a part of that one."""
    for child in _statements(node):
        if isinstance(child, FunctionNode):
            yield child
        else:
            yield from _functions(child)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    return (child for child in ast.iter_child_nodes(node) if isinstance(child, STATEMENTS))


def _first_paragraph(docstring: str) -> str:
    return _encodable(" ".join(re.split(r"\n\s*\n", docstring, maxsplit=1)[0].split()))


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()  # a lone surrogate, legal in Python, cannot be written


def _refusal(node: FunctionNode, query: str) -> str | None:
    """Why a function makes no pair, or None if it makes one."""
    shortest, longest = QUERY_CHARACTERS
    if not query:
        return "no docstring"
    if len(query) < shortest or len(query.split()) < QUERY_WORDS or SECTION.match(query):
        return "docstring says too little"
    if len(query) > longest:
        return "docstring too long"
    if any("overload" in ast.unparse(decorator) for decorator in node.decorator_list):
        return "overload"
    return "no body" if all(map(_is_empty, node.body[1:])) else None


def _is_empty(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    raised = ast.unparse(statement) if isinstance(statement, ast.Raise) else ""
    return isinstance(statement, ast.Pass) or raised.startswith("raise NotImplementedError")


def _strip_docstrings(node: ast.AST) -> None:
    if isinstance(node, FunctionNode | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    for child in _statements(node):
        _strip_docstrings(child)


def _without_copies(functions: list[Function], counts: dict[str, Counter[str]]) -> list[Function]:
    """The functions of which no two have equal docstrings, equal code or near copies of code; the first one is kept."""
    kept, queries, codes = [], set(), NearCopies()
    for function in tqdm(functions, "removing copies", unit="function"):
        query = " ".join(re.findall(r"\w+", function.query.lower()))
        if query in queries:
            counts[function.package]["dropped: docstring equals another"] += 1
        elif not codes.add(function.code):
            counts[function.package]["dropped: code copies another"] += 1
        else:
            queries.add(query)
            kept.append(function)
            counts[function.package]["pairs"] += 1
    return kept


def _split(kept: list[Function], holdout_package: str | None, holdout_functions: int) -> dict[str, list[Function]]:
    """train, functions and package; the hash of a pair, not its position, decides whether it is held out."""
    drawn = sorted(kept, key=lambda function: hashlib.sha256(f"{function.query}\n{function.code}".encode()).digest())
    others = [function for function in drawn if function.package != holdout_package]
    held_out = set(others[:holdout_functions])
    if len(others) <= holdout_functions:
        raise UserError(f"{len(others)} pairs found, {holdout_functions} to hold out: none to train on; add packages")
    return {
        "train": [f for f in kept if f.package != holdout_package and f not in held_out],
        "functions": [f for f in kept if f in held_out],
        "package": [function for function in drawn if function.package == holdout_package][:PACKAGE_LIMIT],
    }


def _publish(folder: Path, splits: dict[str, list[Function]], report: dict[str, Any]) -> None:
    """Writes everything beside its final place and renames it, so that a folder that exists is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
        made = Path(unfinished) / folder.name
        made.mkdir()
        write_lines(made / "train.jsonl", [{"query": f.query, "pos": [f.code], "neg": []} for f in splits["train"]])
        for name in ("functions", "package"):
            if splits[name]:
                _write_held_out(made / name, splits[name])
        (made / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same content
                raise


def _write_held_out(folder: Path, functions: list[Function]) -> None:
    corpus = {f.place: f.code for f in functions}
    queries = {f"query:{f.place}": f.query for f in functions}
    write_beir(folder, corpus, queries, {f"query:{f.place}": {f.place: 1} for f in functions})
