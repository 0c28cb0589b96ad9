"""The charts of a report, as Vega-Lite specifications built and checked by Altair.

Colors and fonts come from the page, which draws the charts again when the reader's color scheme changes. Texts of a user
appear only as values of fields with fixed names, which Vega draws as plain text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

ChartValues = Sequence[Mapping[str, Any]]
CHART_DATA = alt.NamedData("table")
CHART_HEIGHT_PX = 220
MAX_LINE_POINTS = 600  # points of a line; more are averaged
BASELINE_DASH_PX = [5, 4]
ROW_HEIGHT_PX = 18
MAX_TWO_COLUMN_CHARS = 22  # characters of the longest name in a legend of two columns


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of a report.

    Attributes:
        title: Title.
        spec: The Vega-Lite specification.
        note: Caption below the chart.
        is_wide: Whether it takes the whole width of the page.
    """

    title: str
    spec: Mapping[str, Any]
    note: str = ""
    is_wide: bool = False


def _build_spec(chart: alt.TopLevelMixin, values: ChartValues) -> dict[str, Any]:
    """Return the specification of a chart with its data, and without Altair's own theme."""
    spec = chart.to_dict()
    del spec["config"]
    spec.pop("$schema")
    return {**spec, "datasets": {CHART_DATA.name: list(values)}}


def _make_color(field: str, values: ChartValues) -> alt.Color:
    """Return colors for the distinct values of a field, in their order, with a legend if there are several."""
    names = list(dict.fromkeys(row[field] for row in values))
    columns = 2 if max(map(len, names), default=0) <= MAX_TWO_COLUMN_CHARS else 1  # a phone has room for two short names
    legend = alt.Legend(title=None, orient="top", columns=columns, labelLimit=320) if len(names) > 1 else None
    return alt.Color(f"{field}:N", sort=None, scale=alt.Scale(domain=names), legend=legend)


def draw_lines(
    title: str,
    values: ChartValues,
    y_title: str,
    *,
    x_title: str = "step",
    note: str = "",
    starts_at_zero: bool = False,
    with_points: bool = False,
) -> Chart:
    """Draw lines of `value` by `x`, one per `series`. Rows with `baseline` true are dashed.

    It has seven parameters because most are options.

    Args:
        title: Title.
        values: Rows of x, value, series and, optionally, baseline.
        y_title: Title of the axis of values.
        x_title: Title of the other axis.
        note: Caption below the chart.
        starts_at_zero: Whether the axis of values starts at 0.
        with_points: Whether points are always marked. Otherwise only the one nearest to the pointer is.
    """
    rows = [{"baseline": False, **row} for row in average_points(values)]
    hover = alt.selection_point(
        name="hover", on="pointerover", clear="pointerout", nearest=True, fields=["x", "series"], empty=False
    )
    base = alt.Chart(CHART_DATA).encode(
        x=alt.X("x:Q", title=x_title, axis=alt.Axis(tickMinStep=1, format="~s", grid=False), scale=alt.Scale(nice=False)),
        y=alt.Y("value:Q", title=y_title, scale=alt.Scale(zero=starts_at_zero), axis=alt.Axis(tickCount=5)),
        color=_make_color("series", rows),
    )
    dash = alt.condition("datum.baseline", alt.value(BASELINE_DASH_PX), alt.value([1, 0]))
    lines = base.mark_line(strokeWidth=2, clip=True).encode(strokeDash=dash, detail="baseline:N")
    points = base.mark_circle(size=60).encode(
        opacity=alt.value(1) if with_points else alt.condition(hover, alt.value(1), alt.value(0)),
        tooltip=[
            alt.Tooltip("series:N", title=" "),
            alt.Tooltip("x:Q", title=x_title, format=","),
            alt.Tooltip("value:Q", title=y_title, format=".4~g"),
        ],
    )
    layers = alt.layer(lines, points.add_params(hover)).properties(width="container", height=CHART_HEIGHT_PX)
    return Chart(title, _build_spec(layers, rows), note)


def average_points(values: ChartValues) -> list[dict[str, Any]]:
    """Return at most `MAX_LINE_POINTS` rows of every series: means of consecutive rows. Gaps (null) stay gaps."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in values:
        series.setdefault(row["series"], []).append(row)
    means = []
    for rows in series.values():
        block_size = -(-len(rows) // MAX_LINE_POINTS)
        for start in range(0, len(rows), block_size):
            block = [row for row in rows[start : start + block_size] if row["value"] is not None]
            last = rows[min(start + block_size, len(rows)) - 1]
            mean = sum(row["value"] for row in block) / len(block) if block else None
            means.append({**last, "value": mean})
    return means


def draw_histogram(title: str, values: ChartValues, x_title: str, y_title: str, note: str = "") -> Chart:
    """Draw overlaid histograms, one per `kind`: `share` is the height of the bin from `start` to `end`."""
    base = (
        alt.Chart(CHART_DATA)
        .mark_bar(opacity=0.55, binSpacing=0)
        .encode(
            x=alt.X("start:Q", bin="binned", title=x_title, axis=alt.Axis(tickCount=6, grid=False)),
            x2="end:Q",
            y=alt.Y("share:Q", stack=None, title=y_title, axis=alt.Axis(tickCount=4, format="~%")),
            color=_make_color("kind", values),
            tooltip=[
                alt.Tooltip("kind:N", title=" "),
                alt.Tooltip("start:Q", title="from", format=".3~g"),
                alt.Tooltip("end:Q", title="to", format=".3~g"),
                alt.Tooltip("share:Q", title="share", format=".1%"),
            ],
        )
    )
    return Chart(title, _build_spec(base.properties(width="container", height=CHART_HEIGHT_PX), values), note)


def draw_bars(title: str, values: ChartValues, x_title: str, note: str = "") -> Chart:
    """Draw horizontal bars of `share`, one per `name`, colored by `group`, in the order of the rows."""
    chart = (
        alt.Chart(CHART_DATA)
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X("share:Q", title=x_title, axis=alt.Axis(tickCount=5, format="~%", grid=True)),
            y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=180, grid=False)),
            yOffset=alt.YOffset("group:N", sort=None),
            color=_make_color("group", values),
            tooltip=[
                alt.Tooltip("name:N", title="source"),
                alt.Tooltip("group:N", title=" "),
                alt.Tooltip("share:Q", title=x_title, format=".1%"),
            ],
        )
    )
    bars = len({(row["name"], row["group"]) for row in values})
    return Chart(title, _build_spec(chart.properties(width="container", height=max(bars * ROW_HEIGHT_PX, 60)), values), note)


def draw_points(title: str, values: ChartValues, note: str = "") -> Chart:
    """Draw a map of texts: points at `x`, `y`, colored by `source`. A click shows the text below the chart."""
    axis = alt.Axis(title=None, labels=False, ticks=False, domain=False, grid=False)
    chart = (
        alt.Chart(CHART_DATA)
        .mark_circle(size=36, opacity=0.65)
        .encode(
            x=alt.X("x:Q", axis=axis, scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", axis=axis, scale=alt.Scale(zero=False)),
            color=_make_color("source", values),
            tooltip=[alt.Tooltip("source:N"), alt.Tooltip("text:N")],
        )
    )
    return Chart(title, _build_spec(chart.properties(width="container", height=420), values), note, is_wide=True)


def draw_heat_map(title: str, values: ChartValues, note: str = "") -> Chart:
    """Draw cells of `weight`: a `row` for each text, grouped by source, and a `column` for each pair of head and latent."""
    chart = alt.Chart(CHART_DATA).mark_rect(stroke=None).encode(
        x=alt.X("column:O", axis=alt.Axis(title="head and latent", labels=False, ticks=False, grid=False)),
        y=alt.Y("row:O", sort=None, axis=alt.Axis(title="text", grid=False, ticks=False)),
        color=alt.Color("weight:Q", legend=alt.Legend(title="weight", orient="top", format=".3~g", gradientLength=160)),
        tooltip=[
            alt.Tooltip("source:N"), alt.Tooltip("text:N"), alt.Tooltip("head:Q"), alt.Tooltip("latent:Q"),
            alt.Tooltip("weight:Q", format=".4~g"),
        ],
    )  # fmt: skip
    height = len({row["row"] for row in values}) * ROW_HEIGHT_PX
    return Chart(title, _build_spec(chart.properties(width="container", height=height), values), note, is_wide=True)
