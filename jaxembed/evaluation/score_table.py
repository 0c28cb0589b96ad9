"""Result tables as papers print them: a column per type of task, the average, and rows of published models."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from jaxembed.config.published_scores import read_published_tables
from jaxembed.evaluation.tasks import EvaluationTask, GroupMember

TABLES_FILE = "tables.json"
ALL_TASKS, ALL_GROUPS = "all tasks", "all benchmarks"
BM25_ROW = "BM25"
# Columns of NV-Embed's Table 1, in its order. Other types of tasks follow.
TYPE_ORDER = ("Retrieval", "Reranking", "Clustering", "PairClassification", "Classification", "STS", "Summarization")
VERSION_KEYS = ("widths", "precisions")  # of scores by version of the vectors, in `EvaluationTask.score`
Score = float | None  # in percent; None: not scored, or not finite


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """A table of averages in percent.

    Attributes:
        title: The group of tasks.
        columns: Number of tasks by column.
        rows: Scores by row: one for each column, then the average.
        sources: Where the rows of published models come from.
        published: Names of the rows of published models.
    """

    title: str
    columns: Mapping[str, int]
    rows: Mapping[str, Sequence[Score]]
    sources: Sequence[str]
    published: Sequence[str] = ()

    def format(self) -> str:
        """Return the table in Markdown. Each column name is followed by its number of tasks."""
        names = [f"{name} ({count})" for name, count in self.columns.items()]
        average = "Average" if self.title == ALL_GROUPS else f"Average ({sum(self.columns.values())})"
        lines = [
            f"## {self.title}",
            "",
            "| Model | " + " | ".join([*names, average]) + " |",
            "|---" + "|---:" * (len(names) + 1) + "|",
            *(f"| {name} | " + " | ".join(map(_format_cell, cells)) + " |" for name, cells in self.rows.items()),
        ]
        if self.sources:
            lines += ["", f"Published rows: {'; '.join(self.sources)}."]
        return "\n".join(lines)


def build_tables(model: str, tasks: Sequence[EvaluationTask], scores: Mapping[str, Mapping[str, Any]]) -> list[ScoreTable]:
    """Return the tables of a run: one for each group of tasks, and an overview if there are several groups.

    Args:
        model: Name of the model's row.
        tasks: The tasks.
        scores: Scores by task, as in `EvaluationTask.score`.
    """
    members_by_group: dict[str, list[tuple[GroupMember, Mapping[str, Any]]]] = {}
    scored_tasks = [task for task in tasks if scores[task.name]["metric"]]  # tasks without judgments have no metric
    for task in scored_tasks:
        for member in task.groups or (GroupMember(ALL_TASKS, task.type),):
            members_by_group.setdefault(member.group, []).append((member, scores[task.name]))
    tables = [_build_table(group, model, members) for group, members in members_by_group.items()]
    if len(tables) > 1:
        tables.append(_build_overview(tables))
    return [_add_published_rows(table) for table in tables]


def _build_table(group: str, model: str, members: Sequence[tuple[GroupMember, Mapping[str, Any]]]) -> ScoreTable:
    """Return the table of a group.

    The model has one row for each width and each precision that was scored. The row of BM25 follows if a task has its score.
    """
    counts = Counter(member.column for member, _ in members)
    columns = {name: counts[name] for name in sorted(counts, key=get_type_position)}
    names = ((key, name) for key in VERSION_KEYS for _, result in members for name in result.get(key, {}))
    versions: list[tuple[str, str] | None] = list(dict.fromkeys(names))
    rows = {}
    for version in versions or [None]:
        values = [(member.column, _read_score(result, member, version)) for member, result in members]
        label = f"{model}, {version[1]}" if version and len(versions) > 1 else model
        rows[label] = _average_columns(columns, values)
    if any("bm25" in result for _, result in members):
        rows[BM25_ROW] = _average_columns(columns, [(member.column, _read_bm25(result)) for member, result in members])
    return ScoreTable(group, columns, rows, ())


def _average_columns(columns: Iterable[str], values: Sequence[tuple[str, Score]]) -> list[Score]:
    """Return the mean of each column, given the values with their columns, and the mean of all."""
    means = [_mean([value for column, value in values if column == name]) for name in columns]
    return [*means, _mean([value for _, value in values])]


def _build_overview(tables: Sequence[ScoreTable]) -> ScoreTable:
    """Return a table with the averages of the others, one column each (KaLM, Table 2)."""
    labels = dict.fromkeys(label for table in tables for label in table.rows if label != BM25_ROW)
    averages = {label: [table.rows[label][-1] if label in table.rows else None for table in tables] for label in labels}
    rows = {label: [*cells, _mean(cells)] for label, cells in averages.items()}
    return ScoreTable(ALL_GROUPS, {table.title: sum(table.columns.values()) for table in tables}, rows, ())


def _add_published_rows(table: ScoreTable) -> ScoreTable:
    """Return a table with the rows that papers print for the same tasks."""
    rows, sources = dict(table.rows), []
    for published_table in read_published_tables().values():
        if published_table.benchmark != table.title or not published_table.columns.keys() & table.columns.keys():
            continue
        counts = ", ".join(f"{name} ({count})" for name, count in published_table.columns.items())
        has_same_columns = dict(published_table.columns) == dict(table.columns)
        sources.append(published_table.source if has_same_columns else f"{published_table.source}, whose columns are {counts}")
        for name, row in published_table.rows.items():
            cells = dict(zip(published_table.columns, row.scores, strict=True))
            rows.setdefault(name, [*(cells.get(column) for column in table.columns), row.average])
    return dataclasses.replace(table, rows=rows, sources=sources, published=[name for name in rows if name not in table.rows])


def _read_score(result: Mapping[str, Any], member: GroupMember, version: tuple[str, str] | None) -> Score:
    """Return the score of a task in a group, in percent.

    Args:
        result: Scores of the task, as in `EvaluationTask.score`.
        member: The group, with the subsets that count in it.
        version: A key of `VERSION_KEYS` and a name under it, such as ("widths", "256"). None: there are no versions.
    """
    key, name = version or ("", "")
    version_scores = result.get(key, {})
    parts = [result["subsets"].get(subset) for subset in member.subsets]
    if parts and len(parts) < len(result["subsets"]):  # only the first version has scores of subsets
        score = _mean(parts) if name == next(iter(version_scores), "") else None
    else:
        score = version_scores.get(name) if version else result["score"]
    return None if score is None else 100 * score


def _read_bm25(result: Mapping[str, Any]) -> Score:
    """Return the main score of BM25 on a task in percent, or None if it was not scored there."""
    return 100 * result["bm25"][result["metric"]] if "bm25" in result else None


def _mean(values: Sequence[Score]) -> Score:
    """Return the mean, or None if a value is missing."""
    known_values = [value for value in values if value is not None]
    return fmean(known_values) if len(known_values) == len(values) else None


def get_type_position(column: str) -> tuple[int, str]:
    """Return the sort key of a type of tasks: the order of the papers, then the name."""
    return (TYPE_ORDER.index(column) if column in TYPE_ORDER else len(TYPE_ORDER), column)


def _format_cell(cell: Score) -> str:
    return "-" if cell is None else f"{cell:.2f}"
