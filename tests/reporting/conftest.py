"""A tiny run, and the report about it, which the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers.reports import write_report, write_run


class Report(NamedTuple):
    run: Path
    path: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny run."""
    return write_run(tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="session")
def report(run: Path) -> Report:
    """The report about that run, written from its directory alone."""
    path = run.parent / "report.html"
    return Report(run, path, write_report(run, path))
