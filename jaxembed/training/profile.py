"""A trace of some steps of a run, for TensorBoard, XProf and Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from jaxembed.devices import processes


class Profile:
    """Records the steps `first` to `last` of a run with jax.profiler into a folder; of None, nothing.

    Of several processes the first one records, its own devices. A run that begins after `first` is recorded from there.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._first, self._last = steps or (0, -1)
        self._folder = folder
        self._recording = False

    def before(self, step: int) -> None:
        """A step is about to begin."""
        if not self._recording and self._first <= step <= self._last and processes.is_first():
            jax.profiler.start_trace(self._folder)
            self._recording = True

    def after(self, step: int, result: Any) -> None:
        """A step was started that gives `result`; after the last one, the trace is written when its devices are done."""
        if self._recording and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was recorded of a run that ends before `last`."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
