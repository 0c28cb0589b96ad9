"""TensorBoard event files, written in the calling thread.

TensorBoard's own writer has a thread. If the disk is full, that thread dies, and the bounded queue to it blocks the training
loop for good. Here an error reaches the caller.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """A new event file in a folder. Every method raises `OSError` if it cannot be written."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        """Create the file.

        Args:
            folder: The folder, which is created if it does not exist.
            purge_step: Step of the checkpoint that a run resumes from. TensorBoard hides later steps of earlier files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("ab"))
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.flush()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for name, value in values.items():
            tag = re.sub(r"[^-/\w.]", "_", name).lstrip("/")
            self._write(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **content: object) -> None:
        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
