"""A trace of some steps of a run, for TensorBoard, XProf and Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from jaxembed.devices import processes


class Profile:
    """Records some steps of a run with `jax.profiler`. Only process 0 records, and only its own devices."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """Choose the steps to record.

        Args:
            steps: The first and the last step to record, or None to record nothing. A run that starts later than the first
                step is recorded from its start.
            folder: Folder for the trace.
        """
        self._first, self._last = steps or (0, -1)
        self._folder = folder
        self._is_recording = False

    def before_step(self, step: int) -> None:
        """Start the trace if the step that starts now is one of those to record."""
        if not self._is_recording and self._first <= step <= self._last and processes.is_first():
            jax.profiler.start_trace(self._folder)
            self._is_recording = True

    def after_step(self, step: int, result: Any) -> None:
        """Write the trace if this was the last step to record, once the devices have computed its result."""
        if self._is_recording and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write the trace of a run that ends before the last step to record."""
        if self._is_recording:
            jax.profiler.stop_trace()
            self._is_recording = False
