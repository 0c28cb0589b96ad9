"""TensorBoard event files, written in the calling thread.

tensorboardX's `SummaryWriter` writes in a thread of its own. If the disk is full, that thread dies, and the bounded queue to it
blocks the training loop for good. Here an error reaches the caller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

FLUSH_PERIOD_S = 10.0  # a flush waits for the disk


class EventFile:
    """A new event file in a folder. Every method raises `OSError` if it cannot be written."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        """Create the file.

        Args:
            folder: The folder, which is created if it does not exist.
            purge_step: Step of the checkpoint that a run resumes from. TensorBoard hides what earlier files have after it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flush_time = time.monotonic()
        if purge_step is not None:
            self._write(purge_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for name, value in values.items():
            self._write(step, summary=scalar(name, value))
        if time.monotonic() - self._flush_time > FLUSH_PERIOD_S:
            self._writer.flush()
            self._flush_time = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, step: int, **content: object) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
