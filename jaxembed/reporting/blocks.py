"""Building blocks of a report's sections besides charts: tables, collapsed texts, and number formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxembed.reporting.charts import Chart

NO_VALUE = "–"
Cell = str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Titles of the columns. The first column has texts.
        rows: The cells of each row, formatted.
        text_columns: Number of the leading columns that hold texts; the others hold numbers.
        caption: Caption below the table.
        groups: Indices of the rows that head a group of rows.
        best: (row, column) of cells that are emphasized.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    caption: str = ""
    groups: frozenset[int] = frozenset()
    best: frozenset[tuple[int, int]] = frozenset()


@dataclasses.dataclass(frozen=True)
class Collapsible:
    """A long text that is collapsed until the reader opens it."""

    summary: str
    text: str


@dataclasses.dataclass(frozen=True)
class ReportSection:
    """A section of a report.

    Attributes:
        id: Its HTML id, which links refer to.
        title: Its title.
        intro: Text below the title.
        headline_numbers: The most important numbers: label, value, and detail of each.
        charts: Its charts.
        tables: Its tables, below the charts.
        collapsibles: Its collapsed texts, at the end.
        neighbors: Objects for the browser of neighbors, one per set of queries (`make_neighbor_section`).
    """

    id: str
    title: str
    intro: str = ""
    headline_numbers: Sequence[tuple[str, str, str]] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    collapsibles: Sequence[Collapsible] = ()
    neighbors: Sequence[Any] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.headline_numbers or self.charts or self.tables or self.collapsibles or self.neighbors)


def format_number(value: float | None, digits: int = 4) -> str:
    """Return a number with fixed digits after the point, or a dash."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def format_count(value: float | None) -> str:
    """Return an integer with thousands separators, or a dash."""
    return NO_VALUE if value is None else f"{value:,.0f}"


def format_percent(value: float | None, digits: int = 1) -> str:
    """Return a share as a percentage, or a dash."""
    return NO_VALUE if value is None else f"{100 * value:.{digits}f} %"


def format_size(value: float | None) -> str:
    """Return a large number in thousands, millions or billions, or a dash."""
    if value is None:
        return NO_VALUE
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:g}"
