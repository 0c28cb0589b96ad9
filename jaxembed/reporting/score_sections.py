"""Sections of a report that compare models: sizes, scores, scores by width, comparisons, leaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxembed.config.local_paths import shorten_path
from jaxembed.errors import UserError
from jaxembed.evaluation.score_table import get_type_position
from jaxembed.reporting.blocks import (
    NO_VALUE,
    Collapsible,
    ReportSection,
    Table,
    format_count,
    format_number,
    format_percent,
    format_size,
)
from jaxembed.reporting.charts import draw_lines
from jaxembed.reporting.inputs import ReportedModel
from jaxembed.reporting.model_size import ModelSize
from jaxembed.reporting.score_files import average_scores, average_tasks, average_widths

SizesByName = Mapping[str, ModelSize | None]


def make_summary_section(models: Sequence[ReportedModel], sizes: SizesByName, baseline: str | None) -> ReportSection:
    """Return the headline numbers of a model, or a table that compares several.

    Args:
        models: The models.
        sizes: Their sizes, by name.
        baseline: Name of the model that scores are compared with. Default: the first.

    Raises:
        UserError: No model has the name of the baseline.
    """
    names = [model.name for model in models]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline: no model of the report is named {baseline!r} (expected one of {', '.join(names)}).")
    if len(models) == 1:
        return ReportSection("summary", "Summary", headline_numbers=_summarize_model(models[0], sizes[models[0].name]))
    return ReportSection("summary", "Models", tables=[_compare_models(models, sizes, baseline or names[0])])


def _summarize_model(model: ReportedModel, size: ModelSize | None) -> list[tuple[str, str, str]]:
    """Return the headline numbers of a model: label, value, and detail of each."""
    headline_numbers: list[tuple[str, str, str]] = []
    if run := model.run:
        last = run.losses[-1] if run.losses else {}
        headline_numbers.append(
            ("loss", format_number(last.get("loss")), f"after step {last.get('step', 0):,} of {run.config.total_steps:,}")
        )
        for metric, score in list(run.get_last_scores().items())[:2]:
            before, bm25 = (run.get_last_scores(key).get(metric) for key in ("untrained", "bm25"))
            details = [f"before training {before:.4f}"] if before is not None else []
            details += [f"BM25 {bm25:.4f}"] if bm25 is not None else []
            headline_numbers.append((metric, format_number(score), ", ".join(details)))
    if model.tasks:
        headline_numbers.append(
            ("benchmark", _format_score(average_tasks(model.tasks)), f"mean of {len(model.tasks)} tasks, × 100")
        )
    if size:
        detail = f"{_format_memory(size)} GiB in float32; {size.attention} attention, "
        detail += f"{size.pooling.replace('_', ' ')} pooling"
        headline_numbers.append(("parameters", format_size(size.parameters), detail))
        headline_numbers.append(("vectors", format_count(size.width), f"dimensions; texts of up to {size.max_length:,} tokens"))
    return headline_numbers


def _compare_models(models: Sequence[ReportedModel], sizes: SizesByName, baseline: str) -> Table:
    """Return the table of the survey (Cao 2024, Table 3), with scores relative to a baseline."""
    tasks = _intersect([list(model.tasks) for model in models if model.tasks])
    held_out = list(dict.fromkeys(metric for model in models for metric in model.held_out))
    scores_by_model = {model.name: {metric: model.held_out.get(metric) for metric in held_out} for model in models}
    if tasks:
        scores_by_model = {
            model.name: {
                f"mean of {len(tasks)} tasks": _to_percent(average_tasks(model.tasks, tasks)),
                **scores_by_model[model.name],
            }
            for model in models
        }
    metrics = list(scores_by_model[baseline])
    # A relative score needs a second model that has the score.
    compared_metrics = {
        metric for metric in metrics if sum(scores[metric] is not None for scores in scores_by_model.values()) > 1
    }
    columns = ["model", "parameters (M)", "memory (GiB, float32)", "width", "max. tokens"]
    columns += [title for m in metrics for title in ([m, f"{m} vs {baseline}"] if m in compared_metrics else [m])]
    rows = []
    for model in models:
        cells = [model.name, *_format_size_cells(sizes[model.name])]
        for metric in metrics:
            score, reference = scores_by_model[model.name][metric], scores_by_model[baseline][metric]
            cells.append(format_number(score, 2 if metric.startswith("mean of") else 4))
            if metric in compared_metrics:
                cells.append(NO_VALUE if model.name == baseline else _format_change(score, reference))
        rows.append(cells)
    score_columns = [i for i, column in enumerate(columns) if column in metrics]
    best = _find_best(rows, ([(i, column) for i in range(len(rows))] for column in score_columns))
    caption = f"Means count the {len(tasks)} tasks that all models with a benchmark have, × 100." if tasks else ""
    return Table(columns, rows, caption=caption, best=best)


def _format_size_cells(size: ModelSize | None) -> list[str]:
    """Return the cells of parameters in millions, memory in GiB, width, and maximum length."""
    if size is None:
        return [NO_VALUE] * 4
    parameters = format_number(size.parameters / 1e6, 1 if size.parameters >= 1e6 else 3)
    return [parameters, _format_memory(size), format_count(size.width), format_count(size.max_length)]


def _format_memory(size: ModelSize) -> str:
    return format_number(size.memory_gib, 2 if size.memory_gib >= 0.1 else 4)


def _format_change(score: float | None, reference: float | None) -> str:
    return NO_VALUE if score is None or not reference else f"{100 * (score - reference) / abs(reference):+.1f} %"


def _intersect(lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in lists[0] if all(name in names for names in lists)] if lists else []


def _to_percent(score: float | None) -> float | None:
    return None if score is None else 100 * score


def _format_score(score: float | None) -> str:
    return format_number(_to_percent(score), 2)


def _find_best(rows: Sequence[Sequence[str]], groups: Iterable[Iterable[tuple[int, int]]]) -> frozenset[tuple[int, int]]:
    """Return the cells with the largest number of their group, unless all cells of the group are equal.

    Args:
        rows: The cells of a table.
        groups: Row and column of each cell of each group.
    """
    best: set[tuple[int, int]] = set()
    for cells in groups:
        values = {(i, column): float(rows[i][column]) for i, column in cells if rows[i][column] != NO_VALUE}
        if len(set(values.values())) > 1:
            best |= {cell for cell, number in values.items() if number == max(values.values())}
    return frozenset(best)


def make_benchmark_section(models: Sequence[ReportedModel]) -> ReportSection:
    """Return the scores of every task by type, and their means."""
    scored_models = [model for model in models if model.tasks]
    if not scored_models:
        return ReportSection("benchmark", "Benchmark")
    table = _make_benchmark_table(scored_models)
    return ReportSection(
        "benchmark",
        "Benchmark",
        tables=[table, *_list_published_tables(scored_models)],
        collapsibles=_list_instructions(scored_models),
    )


def _make_benchmark_table(models: Sequence[ReportedModel]) -> Table:
    """Return the scores by task, with a column for each model, and one for BM25 if it was scored."""
    types_and_metrics = {name: (task.type, task.metric) for model in models for name, task in model.tasks.items()}
    columns: dict[str, dict[str, float | None]] = {
        model.name: {name: task.score for name, task in model.tasks.items()} for model in models
    }
    if bm25 := {name: task.bm25 for model in models for name, task in model.tasks.items() if task.bm25 is not None}:
        columns["BM25"] = {**bm25}
    rows: list[list[str]] = []
    groups = set()

    def add_mean(title: str, names: Sequence[str]) -> None:
        """Add a row with the means over some tasks, which heads a group of rows."""
        groups.add(len(rows))
        means = (average_scores([scores.get(name) for name in names]) for scores in columns.values())
        rows.append([f"{title} ({len(names)})", "mean", *map(_format_score, means)])

    for task_type in sorted({task_type for task_type, _ in types_and_metrics.values()}, key=get_type_position):
        names = [name for name, (other_type, _) in types_and_metrics.items() if other_type == task_type]
        add_mean(task_type, names)
        for name in names:
            scores = (column.get(name) for column in columns.values())
            rows.append([name, types_and_metrics[name][1] or NO_VALUE, *map(_format_score, scores)])
    add_mean("All", list(types_and_metrics))
    best = _find_best(rows, ([(i, column) for column in range(2, 2 + len(columns))] for i in range(len(rows))))
    caption = "Scores × 100. A mean is shown only if every task has a score."
    return Table(["task", "metric", *columns], rows, 2, caption, frozenset(groups), best)


def _list_published_tables(models: Sequence[ReportedModel]) -> list[Table]:
    """Return the averages by type of task next to the rows of published models, for each benchmark with a published table.

    Models that were scored on other tasks of a benchmark have a separate table.
    """
    tables: dict[tuple[str, ...], Table] = {}
    for model in models:
        for table in model.benchmark.tables:
            columns = [f"{name} ({count})" for name, count in table.columns.items()]
            rows = {name: [format_number(cell, 2) for cell in cells] for name, cells in table.rows.items()}
            published_rows = [[name, *rows.pop(name)] for name in table.published]
            if not published_rows:
                continue
            first_label = next(iter(rows))  # the model's own name, or its name and a width
            name = first_label.rpartition(", ")[0] if len(rows) > 1 else first_label
            model_rows = [[model.name + label.removeprefix(name), *cells] for label, cells in rows.items()]
            key = (table.title, *columns)
            earlier_rows = tables[key].rows if key in tables else published_rows
            caption = f"{table.title}. Published rows: {'; '.join(table.sources)}."
            tables[key] = Table(["model", *columns, "average"], [*model_rows, *earlier_rows], caption=caption)
    return list(tables.values())


def _list_instructions(models: Sequence[ReportedModel]) -> list[Collapsible]:
    return [
        Collapsible(
            f"Instructions of {model.name}",
            "\n".join(f"{name}: {task.instruction or '(none)'}" for name, task in model.tasks.items()),
        )
        for model in models
        if any(task.instruction for task in model.tasks.values())
    ]


def make_width_section(models: Sequence[ReportedModel]) -> ReportSection:
    """Return the score against the width of the vectors, for models that were scored at several."""
    widths = {model.name: average_widths(model.tasks) for model in models}
    values = [
        {"x": width, "value": 100 * score, "series": name} for name, scores in widths.items() for width, score in scores.items()
    ]
    if not values:
        return ReportSection("widths", "Score against width")
    columns = sorted({width for scores in widths.values() for width in scores})
    rows = []
    for name, scores in widths.items():
        if scores:
            largest_width_score = scores[max(scores)]
            rows.append([name, "score", *(_format_score(scores.get(width)) for width in columns)])
            shares = [
                scores[width] / largest_width_score if width in scores and largest_width_score else None for width in columns
            ]
            rows.append([name, "kept", *map(format_percent, shares)])
    table = Table(
        ["model", "", *(f"{width:,}" for width in columns)], rows, 2, "Kept: the share of the score at the largest width."
    )
    chart = draw_lines("Mean score", values, "score × 100", x_title="width", with_points=True)
    intro = "The mean over the tasks that evaluate --dim scored."
    return ReportSection("widths", "Score against width", intro, charts=[chart], tables=[table])


def make_comparison_section(models: Sequence[ReportedModel]) -> ReportSection:
    """Return what `evaluate --compare` found: differences of two models with their bootstrap intervals, and a conclusion."""
    tables = [_make_comparison_table(model) for model in models if model.benchmark.comparison]
    return ReportSection(
        "comparison", "Comparison", "Paired bootstrap over the items of each task. Scores × 100.", tables=tables
    )


def _make_comparison_table(model: ReportedModel) -> Table:
    comparison = model.benchmark.comparison
    differences: dict[str, Mapping[str, Any]] = dict(comparison.get("differences") or {})
    other_scores = comparison.get("scores") or {}
    rows = []
    for task, difference in differences.items():
        scores = [model.tasks[task].score if task in model.tasks else None, (other_scores.get(task) or {}).get("score")]
        rows.append([task, *map(_format_score, scores), *_format_difference(difference)])
    groups: frozenset[int] = frozenset()
    if mean := comparison.get("mean"):
        groups = frozenset({len(rows)})
        rows.append(["mean", NO_VALUE, NO_VALUE, *_format_difference(mean)])
    columns = ["task", model.name, shorten_path(str(comparison.get("model"))), "difference", "95 % interval", "p", "verdict"]
    return Table(columns, rows, caption=_shorten_conclusion(comparison), groups=groups)


def _shorten_conclusion(comparison: Mapping[str, Any]) -> str:
    """Return the conclusion of a comparison, with absolute paths shortened."""
    conclusion, other = str(comparison.get("conclusion") or ""), str(comparison.get("model"))
    return " ".join(map(shorten_path, conclusion.replace(other, shorten_path(other)).split(" ")))


def _format_difference(comparison: Mapping[str, Any]) -> list[str]:
    """Return the cells of difference, interval, p-value, and verdict."""
    difference = comparison.get("difference")
    low, high = comparison.get("interval") or (None, None)
    return [
        NO_VALUE if difference is None else f"{100 * difference:+.2f}",
        NO_VALUE if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}",
        format_number(comparison.get("p"), 4),
        str(comparison.get("verdict") or comparison.get("no_interval") or NO_VALUE),
    ]


def make_leak_section(models: Sequence[ReportedModel]) -> ReportSection:
    """Return what `evaluate --check-leaks` found: texts of the tasks that are in the training data."""
    rows = [
        [task, model.name, *(format_count(counts.get(key)) for key in ("texts", "exact", "ngram"))]
        for model in models
        for task, counts in model.benchmark.leaks.items()
    ]
    columns = ["task", "model", "texts", "equal to a training text", "share an n-gram only"]
    tables = [Table(columns, rows, text_columns=2)] if rows else []
    return ReportSection("leaks", "Leaked texts", "Texts of the tasks that occur in the training files.", tables=tables)
