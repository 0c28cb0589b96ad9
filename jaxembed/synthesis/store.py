"""An append-only file of all requests and answers of a synthesis. A kill at any moment loses at most its last line."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError
from jaxembed.files import name_in_errors
from jaxembed.synthesis.requests import Answer, Request


class AnswerStore:
    """Answers, keyed by the hash of their request. Threads may share it; a second process is refused.

    A line is written as a whole: {"key": ..., "request": ..., "answer": ...}. Memory holds only the positions of the lines.
    """

    def __init__(self, path: Path):
        """Open the file, create it if it does not exist, and drop a last line that is not complete.

        Args:
            path: The file. Its folder exists.

        Raises:
            UserError: Another process writes the file, or a line is damaged.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._lock = threading.Lock()
        self._is_closed = False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._positions, self._end = self._scan()
            os.ftruncate(self._descriptor, self._end)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UserError(f"{path}: another process is writing it. Wait for that process, or name another output.") from None
        except UserError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Flush the file to the disk and close it. Answers that threads add later are ignored."""
        with self._lock:
            self._is_closed = True
            with name_in_errors(self.path):
                os.fsync(self._descriptor)
            os.close(self._descriptor)

    def get(self, key: str) -> Answer | None:
        """Return the answer to the request with a key, or None."""
        with self._lock:
            position = None if self._is_closed else self._positions.get(bytes.fromhex(key))
            return None if position is None else Answer(**self._read_line(*position)["answer"])

    def add(self, request: Request, answer: Answer) -> None:
        """Store an answer, unless the request has one."""
        record = {"key": request.key, "request": request.to_json(), "answer": dataclasses.asdict(answer)}
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            key = bytes.fromhex(request.key)
            if key in self._positions or self._is_closed:
                return
            num_written = 0
            with name_in_errors(self.path):
                while num_written < len(line):
                    num_written += os.pwrite(self._descriptor, line[num_written:], self._end + num_written)
            self._positions[key] = (self._end, len(line))
            self._end += len(line)

    def _read_line(self, start: int, size: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(os.pread(self._descriptor, size, start))
        return record

    def _scan(self) -> tuple[dict[bytes, tuple[int, int]], int]:
        """Return the position and size of each line by key, and the end of the last complete line."""
        positions: dict[bytes, tuple[int, int]] = {}
        start = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    Answer(**record["answer"])
                    positions.setdefault(bytes.fromhex(record["key"]), (start, len(line)))
                except (ValueError, KeyError, TypeError):
                    problem = "damaged line (expected a stored answer). Remove the line; its request is sent again"
                    raise UserError(f"{self.path}:{number}: {problem}.") from None
                start += len(line)
        return positions, start
