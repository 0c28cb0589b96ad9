"""Tasks that score a model: what each one is, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxembed.errors import UserError
from jaxembed.evaluation.comparison import ItemScores
from jaxembed.evaluation.task_encoder import TaskEncoder, log_prompt_choice
from jaxembed.files import write_json

SCORES_FILE = "scores.json"


class EvaluationTask(Protocol):
    """A task that scores a model."""

    @property
    def name(self) -> str:
        """Name of the task, which no other task of a run has."""
        ...

    def score(self, encoder: TaskEncoder) -> dict[str, Any]:
        """Return the scores of a model.

        Returns:
            {"score", "metric", "type", "instruction", "subsets", "splits"}. `score` is the main score, or None if it is not
            finite; `metric` is its name, and `type` the type of the task, such as Retrieval. `subsets` and `splits` have the
            main score by part.
        """
        ...

    def score_items(self, encoder: TaskEncoder) -> ItemScores:
        """Return the scores of a model with the items that they are computed from, such as queries."""
        ...

    def list_texts(self) -> Iterable[tuple[str, Sequence[str]]]:
        """Return the role and the texts of all inputs that are scored, such as queries and documents."""
        ...


def check_names(tasks: Sequence[EvaluationTask]) -> None:
    """Check that there are tasks, and that each has a name of its own.

    Raises:
        UserError: There is no task, or two have the same name.
    """
    names = [task.name for task in tasks]
    if not names:
        raise UserError("evaluate: no tasks to score. Name them, such as --tasks STSBenchmark.")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"evaluate: two tasks are named {repeated!r}. Remove or rename one.")


def score_tasks(
    encoder: TaskEncoder,
    tasks: Sequence[EvaluationTask],
    out: Path | None = None,
    items: dict[str, ItemScores] | None = None,
) -> dict[str, Any]:
    """Score a model on tasks.

    Args:
        encoder: The model.
        tasks: The tasks.
        out: Folder for `scores.json`, which is written after every task.
        items: Receives the items of every task, for a comparison with another model. None: they are not needed.

    Returns:
        {task: scores}, as in `EvaluationTask.score`.
    """
    log_prompt_choice(encoder)
    scores: dict[str, Any] = {}
    for task in tasks:
        if items is None:
            scores[task.name] = task.score(encoder)
        else:
            items[task.name] = task.score_items(encoder)
            scores[task.name] = items[task.name].summary
        if out:
            write_json(out / SCORES_FILE, scores)
    return scores
