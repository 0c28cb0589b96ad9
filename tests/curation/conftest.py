"""Fixtures of the mining tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, Any]]:
    """Pairs with two negatives each."""
    return [{"query": f"query {i}", "pos": [f"answer {i}"], "neg": [f"old {i}", f"older {i}"]} for i in range(60)]
