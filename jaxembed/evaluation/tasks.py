"""The protocol of evaluation tasks, and the loop that runs them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxembed.config.instructions import InstructionTable
from jaxembed.errors import UserError, suggest
from jaxembed.evaluation.bootstrap import ScoredItems, score_mean, score_spearman
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.labels import score_v_measure
from jaxembed.evaluation.progress import TaskProgress
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.files import exists, format_json, read_json, write_json, write_text

MAX_LISTED_NAMES = 5
SCORES_FILE = "scores.json"
MODEL_FILE = "model.json"  # names the model that scores.json belongs to
FINISHED_FILE = "finished_tasks.json"
ITEMS_FOLDER = "finished_items"
# The statistics of tasks whose results are stored, by name.
STATISTICS = {statistic.__name__: statistic for statistic in (score_mean, score_spearman, score_v_measure)}


@dataclasses.dataclass(frozen=True)
class GroupMember:
    """A task in a table of results.

    Attributes:
        group: Title of the table, such as the name of a benchmark.
        column: Column in which the task counts, such as its type.
        subsets: Subsets of the task that count. Empty: all.
    """

    group: str
    column: str
    subsets: tuple[str, ...] = ()


class EvaluationTask(Protocol):
    """A task that scores a model."""

    @property
    def name(self) -> str:
        """Name of the task, unique in a run."""
        ...

    @property
    def type(self) -> str:
        """Type of the task, such as Retrieval."""
        ...

    @property
    def groups(self) -> Sequence[GroupMember]:
        """Tables of results that the task belongs to, such as that of a benchmark. Empty: the table of all tasks."""
        ...

    @property
    def expected_texts(self) -> int | None:
        """Approximate number of texts that the task encodes, for the progress bar. None: unknown."""
        ...

    @property
    def data_digest(self) -> str:
        """SHA-256 of the data and the settings of its scores. Empty: the task itself stores its results across runs."""
        ...

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores of a model.

        Returns:
            {"score", "metric", "type", "instruction", "subsets", "splits"}. `score` is the main score, or None if it is not
            finite; `metric` is its name, and `type` the type of the task, such as Retrieval. `subsets` and `splits` have the
            main score by part. If the encoder has several widths or precisions, all of these are for the largest width at
            the first precision. "widths" and "precisions" then have the main score of each.
        """
        ...

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with the items that they are computed from, such as queries."""
        ...

    def list_texts(self) -> Iterable[tuple[str, Sequence[str]]]:
        """Return the role and the texts of all inputs that are scored, such as queries and documents."""
        ...


def check_names(tasks: Sequence[EvaluationTask]) -> None:
    """Check that there are tasks, and that their names are unique.

    Raises:
        UserError: There is no task, or two have the same name.
    """
    names = [task.name for task in tasks]
    if not names:
        raise UserError("evaluate: no tasks to score. Name them, such as --tasks STSBenchmark.")
    if repeated_name := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"evaluate: two tasks are named {repeated_name!r}. Remove or rename one.")


def check_instructions(table: InstructionTable, name: str, tasks: Sequence[EvaluationTask]) -> None:
    """Check that a user's table has an instruction for at least one task.

    Args:
        table: The table.
        name: Its name, for errors.
        tasks: The tasks of the run.

    Raises:
        UserError: The table names none of the tasks.
    """
    if any(table.find_instruction(task.name, task.type) is not None for task in tasks):
        return
    table_entries, task_names = [*table.by_task, *table.by_type], [task.name for task in tasks]
    found, expected = (", ".join(names[:MAX_LISTED_NAMES]) or "nothing" for names in (table_entries, task_names))
    suggestion = suggest(table_entries[0], task_names) if table_entries else ""
    raise UserError(f"{name}: names no task of this run (it names: {found}; tasks: {expected}).{suggestion}")


class FinishedTasks:
    """Stored results of tasks in a folder, which a restarted run reuses. mteb itself stores the results of its tasks.

    The folder may have results of several models.
    """

    def __init__(self, folder: Path):
        """Read the results in `folder`."""
        self._path, self._items_folder = folder / FINISHED_FILE, folder / ITEMS_FOLDER
        self._results: dict[str, Any] = read_json(self._path) if exists(self._path) else {}

    def score(self, task: EvaluationTask, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores of a task. They are computed if the folder has none of the same data and model."""
        if not task.data_digest:
            return task.score(encoder)
        key = compute_key(task, encoder)
        if key not in self._results:
            self._store(key, task.score(encoder))
        scores: dict[str, Any] = self._results[key]
        return scores

    def score_items(self, task: EvaluationTask, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a task with the items that they are computed from. They are computed as by `score`."""
        if not task.data_digest:
            return task.score_items(encoder)
        key = compute_key(task, encoder)
        path = self._items_folder / f"{key}.json"
        if key in self._results and exists(path):
            return ItemScores(self._results[key], [_parse_items(part) for part in read_json(path)["parts"]])
        scores = task.score_items(encoder)
        self._items_folder.mkdir(exist_ok=True)
        write_text(path, format_json({"parts": [_items_to_json(part) for part in scores.parts]}))
        self._store(key, scores.summary)
        return scores

    def _store(self, key: str, scores: dict[str, Any]) -> None:
        self._results[key] = scores
        write_json(self._path, self._results)


def compute_key(task: EvaluationTask, encoder: TaskEncoder) -> str:
    """Return the SHA-256 of everything that the scores of a task depend on."""
    identity: list[Any] = [task.name, task.data_digest, encoder.results_revision, encoder.widths]
    if encoder.precisions:
        ranges = None if encoder.ranges is None else encoder.ranges.tolist()
        identity += [encoder.precisions, ranges]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _items_to_json(items: ScoredItems) -> dict[str, Any]:
    """Return items as a JSON object, with the name of their statistic."""
    [statistic_name] = [name for name, statistic in STATISTICS.items() if statistic is items.statistic]
    return {"statistic": statistic_name, "unit": items.unit, "values": items.values.tolist()}


def _parse_items(part: dict[str, Any]) -> ScoredItems:
    """Return the items from the JSON object that `_items_to_json` returns."""
    return ScoredItems(np.array(part["values"], np.float64), STATISTICS[part["statistic"]], part["unit"])


def score_tasks(
    encoder: TaskEncoder,
    tasks: Sequence[EvaluationTask],
    out: Path | None = None,
    items_by_task: dict[str, ItemScores] | None = None,
    finished_tasks: FinishedTasks | None = None,
) -> dict[str, Any]:
    """Score a model on tasks.

    Args:
        encoder: The model.
        tasks: The tasks.
        out: Folder for `scores.json`, which is written after every task.
        items_by_task: Filled with the items of every task, for a comparison with another model. None: they are not needed.
        finished_tasks: Results that a later run uses again.

    Returns:
        {task: scores}, as in `EvaluationTask.score`.
    """
    encoder.prompts.log_origins()
    encoder.progress = TaskProgress({task.name: task.expected_texts for task in tasks})
    scores: dict[str, Any] = {}
    try:
        for task in tasks:
            encoder.progress.begin(task.name)
            if items_by_task is None:
                scores[task.name] = finished_tasks.score(task, encoder) if finished_tasks else task.score(encoder)
            else:
                items_by_task[task.name] = (
                    finished_tasks.score_items(task, encoder) if finished_tasks else task.score_items(encoder)
                )
                scores[task.name] = items_by_task[task.name].summary
            encoder.progress.finish_task()
            if encoder.cache:
                encoder.cache.clear()
            if out:
                write_json(out / SCORES_FILE, scores)
    finally:
        encoder.progress.close()
    return scores
