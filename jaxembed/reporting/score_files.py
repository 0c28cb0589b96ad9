"""Benchmark scores as `evaluate --out` writes them, in scores.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.config.fields import quote_value
from jaxembed.errors import UserError
from jaxembed.evaluation.comparison import COMPARISON_FILE
from jaxembed.evaluation.leaks import LEAKS_FILE
from jaxembed.evaluation.score_table import TABLES_FILE, ScoreTable
from jaxembed.evaluation.tasks import MODEL_FILE, SCORES_FILE
from jaxembed.files import exists, read_json, read_json_value

OTHER_TYPE = "Other"  # the type of a task whose scores do not name one


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The score of a model on a task.

    Attributes:
        score: The main score, from 0 to 1 for most metrics; None if it is not finite.
        type: Type of the task, such as Retrieval.
        metric: Name of the main score; empty if unknown.
        instruction: Instruction of the queries.
        widths: The score by width of the vectors, where several were scored.
        bm25: The main score of BM25 on the same task; None if it was not scored.
    """

    score: float | None
    type: str = OTHER_TYPE
    metric: str = ""
    instruction: str = ""
    widths: Mapping[int, float] = dataclasses.field(default_factory=dict)
    bm25: float | None = None


@dataclasses.dataclass(frozen=True)
class ScoreFile:
    """The scores of a model.

    Attributes:
        model: Name of the model; empty if the file does not give it.
        tasks: The score of each task by its name.
        comparison: What `evaluate --compare` wrote beside the scores; empty without it.
        leaks: What `evaluate --check-leaks` wrote beside the scores; empty without it.
        tables: The tables that `evaluate` wrote beside the scores, with the rows of published models; empty without them.
    """

    model: str
    tasks: Mapping[str, TaskScore]
    comparison: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    leaks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Sequence[ScoreTable] = ()


def find_score_file(path: Path) -> Path | None:
    """Return the file of scores that a path names: the file itself, or the scores.json of a folder."""
    candidate = path / SCORES_FILE if path.is_dir() else path
    return candidate if candidate.suffix == ".json" and exists(candidate) else None


def read_score_file(path: Path) -> ScoreFile:
    """Read the scores of a model.

    Raises:
        UserError: The file is not one that `evaluate` writes.
    """
    content = read_json(path)
    tasks, model = content, ""
    if isinstance(content.get("scores"), dict) and "score" not in content["scores"]:
        tasks, model = content["scores"], str(content.get("model") or "")
    if not tasks:
        raise UserError(f"{path}: has no scores (expected a file that evaluate --out writes)")
    scores = {name: _parse_task(entry, f"{path}: {name}") for name, entry in tasks.items()}
    sibling_paths = [path.with_name(name) for name in (COMPARISON_FILE, LEAKS_FILE, MODEL_FILE)]
    comparison, leaks, model_file = (
        read_json(file) if path.name == SCORES_FILE and exists(file) else {} for file in sibling_paths
    )
    tables_path = path.with_name(TABLES_FILE)
    tables = _read_tables(tables_path) if path.name == SCORES_FILE and exists(tables_path) else []
    return ScoreFile(model or str(model_file.get("model") or ""), scores, comparison, leaks, tables)


def _read_tables(path: Path) -> list[ScoreTable]:
    """Return the tables in a file. Raise `UserError` if it has something else."""
    try:
        return [ScoreTable(**table) for table in read_json_value(path)]
    except TypeError:
        raise UserError(f"{path}: not the tables that evaluate --out writes. Remove it, or score the model again.") from None


def merge_score_files(files: Sequence[ScoreFile]) -> ScoreFile:
    """Return the scores of several files of a model. Later files replace tasks, comparison and leaks of earlier ones."""
    merged = files[0]
    for file in files[1:]:
        merged = ScoreFile(
            file.model or merged.model,
            {**merged.tasks, **file.tasks},
            file.comparison or merged.comparison,
            {**merged.leaks, **file.leaks},
            [*(table for table in merged.tables if table.title not in {new.title for new in file.tables}), *file.tables],
        )
    return merged


def _parse_task(entry: Any, where: str) -> TaskScore:
    """Read the score of a task. Raise `UserError` that starts with `where` if `entry` is not one."""
    if not isinstance(entry, dict) or "score" not in entry:
        raise UserError(f"{where} is not the score of a task (expected a file that evaluate --out writes)")
    widths = entry.get("widths") or {}
    if not isinstance(widths, dict) or not all(str(width).isdecimal() for width in widths):
        raise UserError(f"{where}: widths is {quote_value(widths)} (expected scores by width, such as {{'512': 0.7}})")
    scores = {int(width): _parse_number(score, f"{where}: widths") for width, score in widths.items()}
    metric = str(entry.get("metric") or "")
    bm25 = entry.get("bm25") or {}
    if not isinstance(bm25, dict):
        raise UserError(f"{where}: bm25 is {quote_value(bm25)} (expected scores by metric, such as {{'ndcg_at_10': 0.7}})")
    return TaskScore(
        score=_parse_number(entry["score"], where),
        type=str(entry.get("type") or OTHER_TYPE),
        metric=metric,
        instruction=str(entry.get("instruction") or ""),
        widths={width: score for width, score in sorted(scores.items()) if score is not None},
        bm25=_parse_number(bm25.get(metric), f"{where}: bm25"),
    )


def _parse_number(value: Any, where: str) -> float | None:
    """Return a score, or None if it is missing or not finite. Raise `UserError` for anything else."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}: the score is {quote_value(value)} (expected a number, or null)")
    return float(value) if math.isfinite(value) else None


def average_tasks(tasks: Mapping[str, TaskScore], names: list[str] | None = None) -> float | None:
    """Return the mean score over tasks, or None if one of them has no score.

    Args:
        tasks: Scores by task.
        names: The tasks to average. Default: all.
    """
    return average_scores([tasks[name].score if name in tasks else None for name in (tasks if names is None else names)])


def average_scores(scores: Sequence[float | None]) -> float | None:
    """Return the mean, or None if there are no scores or one is missing."""
    finite = [score for score in scores if score is not None]
    return float(np.mean(finite)) if scores and len(finite) == len(scores) else None


def average_widths(tasks: Mapping[str, TaskScore]) -> dict[int, float]:
    """Return the mean score by width over the tasks that were scored by width.

    Only widths that all of these tasks have are returned.
    """
    width_scores = [task.widths for task in tasks.values() if task.widths]
    shared_widths = set.intersection(*(set(widths) for widths in width_scores)) if width_scores else set()
    return {width: float(np.mean([widths[width] for widths in width_scores])) for width in sorted(shared_widths)}
