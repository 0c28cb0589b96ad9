"""Strategies that damage files, and the check of fuzz tests: a call succeeds, or its one-line error names the file or key."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jaxembed.errors import UserError

numbers = st.one_of(
    st.integers(-2, 5), st.sampled_from([2**31, 2**64, -(2**63), 10**40]), st.floats(), st.booleans(), st.none()
)
names = st.sampled_from(["", "a\nb", "\x00", "\u2028", "\ud83d", "../..", "x" * 300, "preset:tiny", ".nan", "1e400"]) | st.text(
    max_size=6
)
leaves = numbers | names
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)


def iter_tree_paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry of a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from iter_tree_paths(value, (*path, key))


@st.composite
def altered_trees(draw: st.DrawFn, tree: Any) -> Any:
    """Draw a copy of a tree with entries replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(list(iter_tree_paths(tree)) or [("new",)]))
        node = tree
        for part in parents:
            node = node[part]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove":
            node.pop(last, None) if isinstance(node, dict) else node.pop(last)
        elif change == "add" and isinstance(node, dict):
            node[draw(names)] = draw(trees)
        else:
            node[last] = draw(trees)
    return tree


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a copy of some bytes with bits flipped, or bytes cut off, inserted or removed; or draw other bytes."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=200))
    position = draw(st.integers(0, len(content)))
    change = draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if change == "cut":
        return content[:position]
    if change == "insert":
        return content[:position] + draw(st.binary(min_size=1, max_size=8)) + content[position:]
    if change == "remove":
        return content[:position] + content[position + draw(st.integers(1, 8)) :]
    flipped = bytearray(content)
    for index in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        flipped[index] ^= draw(st.integers(1, 255))
    return bytes(flipped)


def encode_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def assert_succeeds_or_names(call: Callable[[], object], *names: str) -> None:
    """Assert that a call succeeds, or raises a `UserError` with a short one-line message that contains one of `names`."""
    try:
        call()
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert len(message) < 2100
        assert any(name in message for name in names), message
