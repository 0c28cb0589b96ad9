"""Warn about held-out sets on which training makes a model worse than its base."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from jaxembed.hub.merging import collect_shared_fields
from jaxembed.runs.open import OpenedRun
from jaxembed.training.metrics import NullRecorder, Recorder, read_metrics

# Key prefixes in metrics.jsonl: scores of the base and their standard errors at step 0, and score drops with a warning.
BASE_PREFIX, NOISE_PREFIX, WARNED_PREFIX = "untrained/", "noise/", "below_base/"


class BaseMonitor:
    """Warns once for each held-out set whose main score drops below the base's by more than its noise.

    The noise is the bootstrap standard error of the base's score. Scores, noise and warnings are read from the metrics of the
    run, so a resumed run continues to be monitored, and repeats no warning.
    """

    def __init__(self, run: OpenedRun, recorder: Recorder | NullRecorder):
        """Read the scores of the base. Call it after they are recorded.

        Args:
            run: The run. If its base has no weights, nothing is monitored.
            recorder: Where warnings are recorded and printed.
        """
        rows = read_metrics(run.run_dir) if run.base.has_weights else []
        self._recorder = recorder
        self._advice = describe_remedies(run)
        self._base_scores = _collect_metrics(rows, BASE_PREFIX)
        self._standard_errors = _collect_metrics(rows, NOISE_PREFIX)
        self._warned_metrics = set(_collect_metrics(rows, WARNED_PREFIX))

    def check(self, step: int, scores: Mapping[str, float]) -> None:
        """Warn about sets whose score is below the base's by more than the noise.

        Args:
            step: The step.
            scores: The scores after the step by SET/METRIC.
        """
        for metric in sorted(self._standard_errors.keys() & scores.keys() - self._warned_metrics):
            base_score, noise = self._base_scores[metric], self._standard_errors[metric]
            drop = base_score - scores[metric]
            if drop > noise:
                self._warned_metrics.add(metric)
                self._recorder.log(step, {f"{WARNED_PREFIX}{metric}": drop})
                self._recorder.say(
                    f"warning: step {step}: {metric} is {scores[metric]:.4f}, and the base's is {base_score:.4f}. The drop "
                    f"of {drop:.4f} is more than the noise of the set (standard error {noise:.4f}). {self._advice}"
                )


def describe_remedies(run: OpenedRun) -> str:
    """Return advice for a model that is worse than its base. Merging is part of it where `merge` accepts both models."""
    remedy = "Lower optim.learning_rate, train fewer steps, or add general data."
    if len(run.model.adapters) > 1 or collect_shared_fields(run.spec) != collect_shared_fields(run.base.spec):
        return remedy
    command = shlex.join(["python", "-m", "jaxembed.merge", "MERGED", str(run.run_dir), run.base.name])
    return f"{remedy} The mean of both models often keeps what the base knew: {command}"


def _collect_metrics(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Return the finite values whose keys start with a prefix, without it."""
    return {
        key.removeprefix(prefix): value
        for row in rows
        for key, value in row.items()
        if key.startswith(prefix) and value is not None
    }
