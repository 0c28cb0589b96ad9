"""Warn about held-out sets on which training makes a model worse than its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxembed.runs.open import OpenedRun
from jaxembed.training.metrics import NullRecorder, Recorder, read_metrics

# Prefixes in metrics.jsonl: the base's scores and their standard errors at step 0, and the drops warned about.
BASE_PREFIX, NOISE_PREFIX, WARNED_PREFIX = "untrained/", "noise/", "below_base/"


class BaseMonitor:
    """Warns once for each held-out set whose main score drops below the base's by more than the set's noise.

    The noise is the bootstrap standard error of the base's score. Everything it needs is in the metrics of the run, so a
    resumed run continues to be monitored, and repeats no warning.
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
        self._base = _collect(rows, BASE_PREFIX)
        self._noise = _collect(rows, NOISE_PREFIX)
        self._warned = set(_collect(rows, WARNED_PREFIX))

    def check(self, step: int, scores: Mapping[str, float]) -> None:
        """Warn about sets whose score is below the base's by more than the noise.

        Args:
            step: The step.
            scores: The scores after the step by SET/METRIC.
        """
        for name in self._noise.keys() & scores.keys() - self._warned:
            drop = self._base[name] - scores[name]
            if drop > self._noise[name]:
                self._warned.add(name)
                self._recorder.log(step, {f"{WARNED_PREFIX}{name}": drop})
                self._recorder.say(
                    f"warning: step {step}: {name} is {scores[name]:.4f}, and the base's is {self._base[name]:.4f}. The drop "
                    f"of {drop:.4f} is more than the noise of the set (standard error {self._noise[name]:.4f}). {self._advice}"
                )


def describe_remedies(run: OpenedRun) -> str:
    """Return advice for a model that is worse than its base.

    Merging with the base needs the same attention, pooling and projection in both.
    """
    remedy = "Lower optim.learning_rate, train fewer steps, or add general data."
    spec, base_spec = run.spec, run.base.spec
    if (spec.attention, spec.pooling, spec.projection) != (base_spec.attention, base_spec.pooling, base_spec.projection):
        return remedy
    command = f"python -m jaxembed.merge MERGED {run.run_dir} {run.base.name}"
    return f"{remedy} The mean of both models often keeps what the base knew: {command}"


def _collect(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Return the finite values whose keys start with a prefix, without it."""
    return {
        key.removeprefix(prefix): value
        for row in rows
        for key, value in row.items()
        if key.startswith(prefix) and value is not None
    }
