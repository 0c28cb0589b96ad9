"""Cells of the tables that benchmarks print."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def format_mean(values: Sequence[float], digits: int) -> str:
    """Return the mean of some values, with their standard deviation if there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
