"""The Python file beside exported models: only jaxembed's own versions of it are run."""

from __future__ import annotations

import ast
import hashlib
import shutil
from pathlib import Path

import pytest

from jaxembed.formats import sentence_transformers
from jaxembed.formats.sentence_transformers import TOKEN_POOLING_FILE, has_own_token_pooling


def test_only_current_and_earlier_versions_of_the_module_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_own_token_pooling(tmp_path)
    copy = Path(shutil.copy(TOKEN_POOLING_FILE, tmp_path))
    assert has_own_token_pooling(tmp_path)
    copy.write_text("# another version\n")
    assert not has_own_token_pooling(tmp_path)
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    monkeypatch.setattr(sentence_transformers, "EARLIER_TOKEN_POOLING_DIGESTS", frozenset({digest}))
    assert has_own_token_pooling(tmp_path)


def test_the_module_imports_nothing_from_the_package() -> None:
    tree = ast.parse(TOKEN_POOLING_FILE.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" in imported
    assert not [name for name in imported if name is None or name.startswith("jaxembed")]
