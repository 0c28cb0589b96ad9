"""A recipe, and a server that answers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.llm_server import MODEL, LlmServer, run_llm_server
from helpers.synthesis import RECIPE
from jaxembed import synthesize as command
from jaxembed.synthesis import endpoints

Synthesize = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait little after failures, keep a cache of our own, and have no key."""
    monkeypatch.setattr(endpoints, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("JAXEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[LlmServer]:
    """A server that behaves well. Tests change its behavior."""
    with run_llm_server() as running:
        yield running


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The file of `RECIPE`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


@pytest.fixture
def synthesize(server: LlmServer, recipe: Path, tmp_path: Path) -> Synthesize:
    """Runs the command in this process: synthesize(*arguments, out=..., server=...)."""

    def run(*arguments: str, out: str = "out", url: str = server.url, model: str = MODEL) -> dict[str, Any]:
        parts = [str(recipe), "--server", url, str(tmp_path / out), "--model", model, *arguments]
        return command.main(command.make_parser().parse_args(parts))

    return run
