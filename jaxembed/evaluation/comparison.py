"""Compare two models on the same tasks, item by item."""

from __future__ import annotations

import dataclasses
import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxembed.evaluation.bootstrap import CONFIDENCE, Difference, ScoredItems, compare_items, summarize_difference

log = logging.getLogger("jaxembed")

COMPARISON_FILE = "comparison.json"
VERDICTS = ("better", "worse", "no difference shown")


@dataclasses.dataclass(frozen=True)
class ItemScores:
    """The scores of a model on a task, with the items that they are computed from.

    Attributes:
        summary: The scores, as `EvaluationTask.score` returns them.
        parts: The items of each part of the task. The main score is the mean over the parts. Empty: unknown.
        missing_reason: Why there are no items.
    """

    summary: dict[str, Any]
    parts: Sequence[ScoredItems] = ()
    missing_reason: str = ""


def compare_tasks(first: Mapping[str, ItemScores], second: Mapping[str, ItemScores], names: tuple[str, str]) -> dict[str, Any]:
    """Compare two models on the same tasks, and print a line about each.

    Args:
        first: Scores of the first model, by task.
        second: Scores of the second model on the same tasks.
        names: Names of the models.

    Returns:
        {"model", "scores", "differences", "mean", "conclusion"}: the name and the scores of the second model; for each task
        the difference (first minus second) with its interval, p-value and verdict; the same for the mean over the tasks; and a
        sentence. A task without results by item has "no_interval", the reason, instead of an interval.
    """
    differences: dict[str, Any] = {}
    all_differences: list[Difference] = []
    log.info("%s compared with %s (difference, %.0f%% interval of the paired bootstrap)", *names, 100 * CONFIDENCE)
    for task, scores in first.items():
        other = second[task]
        if scores.parts and other.parts:
            all_differences.append(compare_parts(scores.parts, other.parts, task))
            differences[task] = all_differences[-1].summarize()
        else:
            differences[task] = _subtract_scores(scores, other)
        log.info("  %s", describe_task_difference(task, scores, other, differences[task]))
    result: dict[str, Any] = {
        "model": names[1],
        "scores": {task: scores.summary for task, scores in second.items()},
        "differences": differences,
        "conclusion": describe_conclusion(names, differences),
    }
    if len(all_differences) > 1:
        mean = average_differences(all_differences)
        result["mean"] = mean.summarize()
        log.info("  mean of %d tasks: %s", len(all_differences), describe_difference(result["mean"]))
    log.info("%s", result["conclusion"])
    return result


def compare_parts(first: Sequence[ScoredItems], second: Sequence[ScoredItems], task: str) -> Difference:
    """Compare the parts of a task, each with its own seed. The difference is the mean over the parts."""
    key = zlib.crc32(task.encode())
    pairs = zip(first, second, strict=True)
    return average_differences([compare_items(a, b, (key, number)) for number, (a, b) in enumerate(pairs)])


def average_differences(differences: Sequence[Difference]) -> Difference:
    """Return the mean of the differences of independent sets of items."""
    if len(differences) == 1:
        return differences[0]
    resampled_differences = np.mean([difference.resampled_differences for difference in differences], axis=0)
    units = {difference.unit for difference in differences}
    return summarize_difference(
        float(np.mean([difference.difference for difference in differences])),
        resampled_differences,
        sum(difference.count for difference in differences),
        units.pop() if len(units) == 1 else "items",
    )


def _subtract_scores(first: ItemScores, second: ItemScores) -> dict[str, Any]:
    """Return the difference of two scores without items, and why it has no interval."""
    scores = first.summary["score"], second.summary["score"]
    difference = None if None in scores else scores[0] - scores[1]
    return {"difference": difference, "no_interval": first.missing_reason or second.missing_reason}


def describe_task_difference(task: str, first: ItemScores, second: ItemScores, summary: Mapping[str, Any]) -> str:
    """Return one line about the scores of two models on a task."""
    scores = [_format_score(model_scores.summary["score"]) for model_scores in (first, second)]
    return f"{task} ({first.summary['metric']}): {scores[0]} against {scores[1]}, {describe_difference(summary)}"


def describe_difference(summary: Mapping[str, Any]) -> str:
    """Return the summary of a difference as text."""
    difference = _format_score(summary["difference"], "+")
    if "no_interval" in summary:
        return f"{difference}, no interval: {summary['no_interval']}"
    low, high = (_format_score(end, "+") for end in summary["interval"])
    return f"{difference} [{low}, {high}], p {summary['p']:.3f}: {summary['verdict']}"


def describe_conclusion(names: tuple[str, str], differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence about two models: on how many tasks the first is better, worse, or not shown to differ."""
    first, second = names
    tasks = {
        verdict: [task for task, summary in differences.items() if summary.get("verdict") == verdict] for verdict in VERDICTS
    }
    better, worse = (f"on {', '.join(tasks[verdict])}" if tasks[verdict] else "" for verdict in VERDICTS[:2])
    if better:
        sentence = f"{first} is better than {second} {better}{f', and worse {worse}' if worse else ''}."
    elif worse:
        sentence = f"{first} is worse than {second} {worse}."
    else:
        sentence = f"No difference between {first} and {second} is shown."
    if (better or worse) and tasks[VERDICTS[2]]:
        sentence += f" No difference is shown on {', '.join(tasks[VERDICTS[2]])}."
    if unknown := [task for task, summary in differences.items() if "no_interval" in summary]:
        sentence += f" Without an interval: {', '.join(unknown)}."
    return sentence


def _format_score(value: float | None, sign: str = "") -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:{sign}.4f}"
