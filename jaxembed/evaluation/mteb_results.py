"""Main scores of a task from mteb's results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.config.field_lists import log_once
from jaxembed.files import finite_or_none

log = logging.getLogger("jaxembed")


def summarize_task(result: Any, instruction: str) -> dict[str, Any]:
    """Return the main scores of a task.

    Args:
        result: mteb's TaskResult.
        instruction: Instruction of the task's queries.

    Returns:
        {"score", "instruction", "subsets", "splits"}. `score` is mteb's own aggregate over all splits and subsets.
        `subsets` and `splits` are the means by subset and by split. A score that is not finite is None.
    """
    if len(result.scores) > 1:
        log_once(f"{result.task_name}: the score is mteb's mean over the splits {', '.join(result.scores)}", logging.INFO)
    subset_scores: dict[str, list[float]] = {}
    split_scores: dict[str, list[float]] = {}
    for split, entries in result.scores.items():
        for entry in entries:
            score = float(entry["main_score"])
            subset_scores.setdefault(entry["hf_subset"], []).append(score)
            split_scores.setdefault(split, []).append(score)
    aggregate = finite_or_none(float(result.get_score()))
    if aggregate is None:
        log.warning(
            "%s: the score is not finite, which happens if all vectors are equal; it is written as null", result.task_name
        )
    return {
        "score": aggregate,
        "instruction": instruction,
        "subsets": {subset: _mean(values) for subset, values in subset_scores.items()},
        "splits": {split: _mean(values) for split, values in split_scores.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return finite_or_none(round(float(np.mean(values)), 6))
