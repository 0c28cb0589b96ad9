"""Sections of a report that come from the files of runs: training, held-out scores, data, and setup."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxembed.config.local_paths import shorten_command
from jaxembed.reporting.blocks import (
    NO_VALUE,
    Collapsible,
    ReportSection,
    Table,
    format_count,
    format_number,
    format_percent,
)
from jaxembed.reporting.charts import Chart, draw_bars, draw_histogram, draw_lines
from jaxembed.reporting.run_files import RunFiles

# Metrics of every run: key, title of the chart, and title of its axis.
STEP_METRICS = (
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "norm"),
    ("useful_tokens_per_second", "Throughput", "non-padding tokens per second"),
    ("padding_fraction", "Padding", "share of computed tokens"),
    ("mfu", "Model FLOPs utilization", "share of the peak"),
)
NON_OBJECTIVE_KEYS = frozenset(
    {"stage", "step", "loss", "step_seconds", "data_wait_seconds", "examples_per_second", "new_programs", "adapter"}
    | {key for key, _, _ in STEP_METRICS}
)
EXIT_PREFIX = "exit_"  # starts the keys of losses at early exits
MAX_CHARTED_SOURCES = 24  # sources of all stages that a chart shows, those with the largest shares
MAX_HISTOGRAM_SOURCES = 6  # sources with a histogram of token lengths
SINGLE_GROUP = "queries"  # name of the group if there is only one run with one stage
MAX_METRIC_CHARTS = 8  # charts of the objectives' own metrics


def make_training_section(runs: Sequence[RunFiles]) -> ReportSection:
    """Return curves of the loss and its parts, the learning rate, throughput, and padding."""
    charts = [draw_lines("Loss", _list_loss_values(runs), "loss", note=_describe_loss_parts(runs))]
    if len(runs) > 1:  # the loss parts of several runs would be too many lines for one chart
        parts = dict.fromkeys(key for run in runs for key in _list_shown_parts(run))
        charts += [_draw_metric(runs, key, describe_part(key), "loss") for key in parts]
    for key, title, y_title in STEP_METRICS:
        values = [
            _make_point(run, row, key, _name_run_if_several(run, runs) or title)
            for run in runs
            for row in run.losses
            if key in row
        ]
        if values:
            starts_at_zero = key in ("learning_rate", "padding_fraction", "mfu")
            charts.append(draw_lines(title, values, y_title, starts_at_zero=starts_at_zero))
    waits = [
        {
            "x": row["step"],
            "value": row["data_wait_seconds"] / row["step_seconds"],
            "series": _name_run_if_several(run, runs) or "waiting",
        }
        for run in runs
        for row in run.losses
        if row.get("step_seconds") and row.get("data_wait_seconds") is not None
    ]
    if waits:
        charts.append(draw_lines("Waiting for data", waits, "share of the step's time", starts_at_zero=True))
    for key in _list_objective_metrics(runs)[:MAX_METRIC_CHARTS]:
        charts.append(_draw_metric(runs, key, key, ""))
    return ReportSection("training", "Training", "One point per logged step.", charts=charts)


def _name_run_if_several(run: RunFiles, runs: Sequence[RunFiles]) -> str:
    """Return the name of a run if a chart shows several, otherwise an empty string."""
    return run.name if len(runs) > 1 else ""


def _make_point(run: RunFiles, row: Mapping[str, Any], key: str, series: str) -> dict[str, Any]:
    return {"x": row["step"], "value": row[key], "series": series}


def _draw_metric(runs: Sequence[RunFiles], key: str, title: str, y_title: str) -> Chart:
    """Draw a metric of several runs, or of one."""
    values = [
        _make_point(run, row, key, _name_run_if_several(run, runs) or title) for run in runs for row in run.losses if key in row
    ]
    return draw_lines(title, values, y_title)


def _list_loss_values(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return the loss of every run, and the parts of it if there is one run."""
    if len(runs) > 1:
        return [_make_point(run, row, "loss", run.name) for run in runs for row in run.losses]
    (run,) = runs
    return [
        _make_point(run, row, key, describe_part(key))
        for key in ("loss", *_list_shown_parts(run))
        for row in run.losses
        if key in row
    ]


def _list_shown_parts(run: RunFiles) -> list[str]:
    """Return the parts of a run's loss if it has several."""
    parts = _list_loss_parts(run)
    return parts if len(parts) > 1 else []


def _describe_loss_parts(runs: Sequence[RunFiles]) -> str:
    """Return the note that explains the parts of the loss with a width or an exit."""
    keys = {key for run in runs for key in _list_loss_parts(run)}
    notes = []
    if any(map(_has_width, keys)):
        notes.append("A part with a width is the loss of vectors truncated to that width (Matryoshka).")
    if any(key.startswith(EXIT_PREFIX) for key in keys):
        notes.append("A part of an exit is the loss of the model truncated to its first layers.")
    return " ".join(notes)


def _list_labels(run: RunFiles) -> set[str]:
    """Return the labels of a run's objectives, numbered as in its metrics."""
    labels = set()
    for stage in run.config.stages:
        names = [objective.name for objective in stage.objectives]
        for i, name in enumerate(names):
            number = names[: i + 1].count(name)
            labels.add(name if number == 1 else f"{name}_{number}")
    return labels


def _list_loss_parts(run: RunFiles) -> list[str]:
    """Return the metrics that are losses: those of the objectives, at widths of Matryoshka vectors, and at early exits."""
    labels = _list_labels(run)
    widths = {width for stage in run.config.stages for width in stage.matryoshka.dims}
    parts = labels | {f"{label}_{width}" for label in labels for width in widths}
    keys = dict.fromkeys(key for row in run.losses for key in row)
    return [key for key in keys if key in parts or key.startswith(EXIT_PREFIX)]


def _list_objective_metrics(runs: Sequence[RunFiles]) -> list[str]:
    """Return the metrics of objectives that are not losses, such as the number of negatives."""
    parts = {key for run in runs for key in _list_loss_parts(run)}
    keys = dict.fromkeys(key for run in runs for row in run.losses for key in row)
    return [key for key in keys if key not in parts | NON_OBJECTIVE_KEYS]


def describe_part(key: str) -> str:
    """Return the name of a part of the loss for a legend."""
    label, _, width = key.rpartition("_")
    if f"{label}_" == EXIT_PREFIX:
        return f"exit after {width} layers" if width.isdecimal() else f"exits, {width}"
    return f"{label}, width {width}" if _has_width(key) else key


def _has_width(key: str) -> bool:
    """Return whether the key of a part of the loss ends with a width. A number up to 9 is that of a repeated objective."""
    label, _, number = key.rpartition("_")
    return bool(label) and number.isdecimal() and int(number) > 9 and not key.startswith(EXIT_PREFIX)


def make_held_out_section(runs: Sequence[RunFiles]) -> ReportSection:
    """Return held-out scores over the steps, next to those of the model before training and of BM25."""
    metrics = list(dict.fromkeys(name for run in runs for _, name, _ in run.list_scores()))
    charts = []
    for metric in metrics:
        values = []
        for run in runs:
            prefix = _name_run_if_several(run, runs)
            points = [{"x": x, "value": v, "series": prefix or "trained"} for x, name, v in run.list_scores() if name == metric]
            last = points[-1]["x"] if points else 0
            values += points
            for key, label in (("untrained", "before training"), ("bm25", "BM25")):
                score = run.get_last_scores(key).get(metric)
                if score is not None:
                    series = f"{prefix}: {label}" if prefix and key == "untrained" else label
                    values += [{"x": x, "value": score, "series": series, "baseline": True} for x in (0, last)]
        charts.append(draw_lines(metric, values, metric.rpartition("/")[2], with_points=True))
    tables = [_make_held_out_table(runs, metrics)] if metrics else []
    intro = "Scores on the held-out sets of eval.sets. Dashed lines: the model before training, and BM25."
    return ReportSection("held-out", "Held-out scores", intro, charts=charts, tables=tables)


def _make_held_out_table(runs: Sequence[RunFiles], metrics: Sequence[str]) -> Table:
    rows = []
    for metric in metrics:
        for run in runs:
            before, bm25 = (run.get_last_scores(key).get(metric) for key in ("untrained", "bm25"))
            scores = [(x, value) for x, name, value in run.list_scores() if name == metric]
            if not scores:
                continue
            best_step, best = max(scores, key=lambda score: score[1])
            last = scores[-1][1]
            gain = NO_VALUE if before is None else f"{last - before:+.4f}"
            cells = [format_number(value) for value in (before, bm25, last)]
            rows.append([metric, run.name, *cells, gain, f"{best:.4f} (step {best_step:,})"])
    columns = ["metric", "run", "before training", "BM25", "trained", "gain", "best"]
    return Table(columns, rows, text_columns=2)


def make_data_section(runs: Sequence[RunFiles]) -> ReportSection:
    """Return the mixture of the sources, the lengths of their texts, what is truncated, and what was dropped."""
    sources = [
        {**source, "name": str(source.get("name")), "group": _name_stage(run, runs, index)}
        for run in runs
        for index, stage in enumerate(run.data)
        for source in stage
    ]
    if not sources:
        return ReportSection("data", "Data")
    largest_sources = sorted(sources, key=lambda source: -float(source.get("share") or 0))[:MAX_CHARTED_SOURCES]
    cut_note = f"The {len(largest_sources)} largest of {len(sources)} sources." if len(largest_sources) < len(sources) else ""
    charts: list[Chart] = []
    if len(largest_sources) > 1:
        shares = [_select_keys(source, "name", "group", "share") for source in largest_sources]
        charts.append(draw_bars("Mixture", shares, "share of the queries", cut_note))
    lengths = [row for source in largest_sources[:MAX_HISTOGRAM_SOURCES] for row in _iter_length_rows(source)]
    if lengths:
        charts.append(
            draw_histogram(
                "Token lengths", lengths, "tokens with prompt, before truncation", "share of the texts",
                "A sample of each source. The last bin also counts all longer texts.",
            )
        )  # fmt: skip
    tables = [_make_source_table(sources), *_make_drop_tables(sources)]
    return ReportSection(
        "data", "Data", "What the run trained on, from data.json in its directory.", charts=charts, tables=tables
    )


def _name_stage(run: RunFiles, runs: Sequence[RunFiles], index: int) -> str:
    stage = f"stage {index + 1}" if len(run.data) > 1 else ""
    return ", ".join(filter(None, (_name_run_if_several(run, runs), stage))) or SINGLE_GROUP


def _select_keys(source: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: source.get(key) for key in keys}


def _iter_length_rows(source: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield the bins of the histogram of token lengths of a source, for `draw_histogram`."""
    tokens = source.get("tokens") or {}
    histogram = tokens.get("histogram") or {"edges": [], "counts": []}
    total = sum(histogram["counts"]) or 1
    name = source["name"] if source["group"] == SINGLE_GROUP else f"{source['name']} ({source['group']})"
    for start, end, count in zip(histogram["edges"][:-1], histogram["edges"][1:], histogram["counts"], strict=True):
        yield {"kind": name, "start": start, "end": end, "share": count / total}


def _make_source_table(sources: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for source in sources:
        tokens = source.get("tokens") or {}
        rows.append(
            [
                str(source["name"]), str(source["group"]), str(source.get("format")),
                format_count(source.get("examples")), format_percent(source.get("share")),
                format_number(source.get("epochs"), 2),
                *(format_count(tokens.get(key)) for key in ("mean", "median", "p95", "most", "max_length")),
                format_percent(tokens.get("truncated")), format_count(sum((source.get("dropped") or {}).values())),
            ]
        )  # fmt: skip
    columns = [
        "source", "run or stage", "format", "examples", "share", "epochs", "tokens: mean", "median", "95 %", "maximum", "limit",
        "truncated", "dropped",
    ]  # fmt: skip
    caption = "Tokens count a sample of queries, positives and negatives with their prompts, before truncation at the limit."
    return _omit_single_group(Table(columns, rows, text_columns=3, caption=caption))


def _make_drop_tables(sources: Sequence[Mapping[str, Any]]) -> list[Table]:
    rows = [
        [str(source["name"]), str(source["group"]), str(reason), format_count(count)]
        for source in sources
        for reason, count in (source.get("dropped") or {}).items()
    ]
    table = Table(["source", "run or stage", "dropped because", "rows"], rows, text_columns=3)
    return [_omit_single_group(table)] if rows else []


def _omit_single_group(table: Table) -> Table:
    """Return a table without its second column if there is only one run and stage."""
    if any(row[1] != SINGLE_GROUP for row in table.rows):
        return table
    rows = [[row[0], *row[2:]] for row in table.rows]
    columns = [table.columns[0], *table.columns[2:]]
    return dataclasses.replace(table, columns=columns, rows=rows, text_columns=table.text_columns - 1)


def make_setup_section(runs: Sequence[RunFiles]) -> ReportSection:
    """Return config, versions, hashes, and commands of the runs."""
    starts = [[run.name, *_describe_start(start)] for run in runs for start in run.starts]
    hashes = [[run.name, *entry] for run in runs for entry in (("base", run.base["name"], run.base["hash"]), *run.hashes)]
    packages = list(dict.fromkeys(package for run in runs for package in run.versions))
    versions = [[package, *(run.versions.get(package, NO_VALUE) for run in runs)] for package in packages]
    tables = [
        Table(["run", "time (UTC)", "command", "from step", "devices", "computation"], starts, 6, "Starts of the run."),
        Table(["run", "kind", "name", "hash"], hashes, 4, "SHA-256 of the inputs."),
        Table(["package", *(run.name for run in runs)], versions, 1 + len(runs), "Versions."),
    ]
    collapsibles = [Collapsible(f"Config of {run.name}", run.config_text) for run in runs]
    return ReportSection("setup", "Setup", tables=[table for table in tables if table.rows], collapsibles=collapsibles)


def _describe_start(start: Mapping[str, Any]) -> list[str]:
    return [
        str(start.get("time", NO_VALUE))[:16].replace("T", " "),
        shorten_command(str(start.get("command") or NO_VALUE)),
        format_count(start.get("step")),
        f"{start.get('devices', NO_VALUE)} × {start.get('device', NO_VALUE)}",
        str(start.get("computation", NO_VALUE)),
    ]
