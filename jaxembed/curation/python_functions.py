"""Docstring and code of every function in a Python file. Files are parsed, never imported or run."""

from __future__ import annotations

import ast
import multiprocessing
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

MIN_QUERY_CHARS, MAX_QUERY_CHARS = 15, 500
MIN_QUERY_WORDS = 3
# A docstring that begins with a section or with markup has no summary.
MARKUP = r">>>|\.\. |:(param|type|returns?|rtype|raises)\b"
SECTION_START = re.compile(rf"{MARKUP}|(Parameters|Args|Arguments|Returns|Examples?|Notes?|Raises)\b\s*(:|-{{3}})")
NUM_WORKERS, MIN_FILES_FOR_WORKERS = 2, 200
STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
FunctionCounts = Counter[str]  # of files, functions, and dropped functions by reason


class SourceFile(NamedTuple):
    """A Python file of a package. `relative_path` is its path below the folder that contains the package."""

    package: str
    path: Path
    relative_path: str


class FunctionPair(NamedTuple):
    """A docstring's first paragraph (`query`) and its function's code without docstrings. `location` is FILE:LINE."""

    package: str
    location: str
    query: str
    code: str


def parse_files(files: Sequence[SourceFile]) -> tuple[list[FunctionPair], dict[str, FunctionCounts]]:
    """Parse files and return their pairs in file order.

    Returns:
        The pairs, and for each package the counts of its files, its functions, and the functions dropped by reason.
    """
    pairs: list[FunctionPair] = []
    counts: dict[str, FunctionCounts] = defaultdict(Counter)
    results = tqdm(_parse_all(files), "parsing", len(files), unit="file")
    for file, (file_pairs, file_counts) in zip(files, results, strict=True):
        pairs += file_pairs
        counts[file.package] += file_counts
    return pairs, counts


def _parse_all(files: Sequence[SourceFile]) -> Iterator[tuple[list[FunctionPair], FunctionCounts]]:
    if len(files) < MIN_FILES_FOR_WORKERS:
        yield from map(_parse_file, files)
        return
    # Spawned, because a fork of a process with JAX's threads may deadlock.
    with ProcessPoolExecutor(NUM_WORKERS, multiprocessing.get_context("spawn")) as executor:
        yield from executor.map(_parse_file, files, chunksize=8)


def _parse_file(file: SourceFile) -> tuple[list[FunctionPair], FunctionCounts]:
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in third-party code
            tree = ast.parse(file.path.read_bytes())
        return _extract_pairs(file, tree)
    except (SyntaxError, ValueError, RecursionError):
        return [], Counter({"files": 1, "dropped: file does not parse": 1})


def _extract_pairs(file: SourceFile, tree: ast.Module) -> tuple[list[FunctionPair], FunctionCounts]:
    pairs, counts = [], Counter(files=1)
    for node in _iter_functions(tree):
        counts["functions"] += 1
        query = _first_paragraph(ast.get_docstring(node) or "")
        if reason := _find_drop_reason(node, query):
            counts[f"dropped: {reason}"] += 1
            continue
        _strip_docstrings(node)
        code = _replace_surrogates(ast.unparse(node))
        pairs.append(FunctionPair(file.package, f"{file.relative_path}:{node.lineno}", query, code))
    return pairs, counts


def _iter_functions(node: ast.AST) -> Iterator[FunctionNode]:
    """Iterate over functions and methods below a node. A function inside a function is part of the outer one."""
    for child in _iter_statements(node):
        if isinstance(child, FunctionNode):
            yield child
        else:
            yield from _iter_functions(child)


def _iter_statements(node: ast.AST) -> Iterator[ast.AST]:
    return (child for child in ast.iter_child_nodes(node) if isinstance(child, STATEMENTS))


def _first_paragraph(docstring: str) -> str:
    return _replace_surrogates(" ".join(re.split(r"\n\s*\n", docstring, maxsplit=1)[0].split()))


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates by `?`. They are legal in Python strings, but cannot be written as UTF-8."""
    return text.encode(errors="replace").decode()


def _find_drop_reason(node: FunctionNode, query: str) -> str | None:
    """Return why a function makes no pair, or None if it makes one."""
    if not query:
        return "no docstring"
    if len(query) < MIN_QUERY_CHARS or len(query.split()) < MIN_QUERY_WORDS or SECTION_START.match(query):
        return "docstring says too little"
    if len(query) > MAX_QUERY_CHARS:
        return "docstring too long"
    if any("overload" in ast.unparse(decorator) for decorator in node.decorator_list):
        return "overload"
    return "no body" if all(map(_is_placeholder, node.body[1:])) else None


def _is_placeholder(statement: ast.stmt) -> bool:
    """Return whether a statement does nothing: a constant, `pass`, or `raise NotImplementedError`."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    code = ast.unparse(statement) if isinstance(statement, ast.Raise) else ""
    return isinstance(statement, ast.Pass) or code.startswith("raise NotImplementedError")


def _strip_docstrings(node: ast.AST) -> None:
    """Remove the docstrings of a function and of everything inside it, in place."""
    if isinstance(node, FunctionNode | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    for child in _iter_statements(node):
        _strip_docstrings(child)
