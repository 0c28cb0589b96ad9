"""End the processes of a run together: each prints one clear line, and none hangs for longer than the run's limit.

A thread of each process (`GroupMonitor`) sends heartbeats to the shared store and waits for the exit reason there. The
reason is written once, by the process that ends the group first:

- A process that fails writes its own error.
- Process 0 writes that another one has not sent a heartbeat for too long.
- Process 0 writes exit code 0 after the last barrier.

If process 0 itself dies or hangs, the others notice that the store does not answer, or JAX aborts them (`report_jax_aborts`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxembed.devices.deadline import call_if_late
from jaxembed.devices.key_value_store import KeyValueStore
from jaxembed.devices.standard_streams import LossyStream, StandardOutputError

MAX_SILENCE_S = 120.0  # a process without a heartbeat for this long counts as lost
MAX_HEARTBEAT_PERIOD_S = 5.0
FAILURE_GRACE_S = 1.0  # time in which another process may write why it has ended
LINGER_S = 3.0  # process 0 ends this much later than the others, because they read the exit reason from its store
EXIT_REASON, HEARTBEATS = "jaxembed/exit_reason", "jaxembed/heartbeats/"
DEFAULT_HANDLER = 0  # SIG_DFL
RESUME_HINT = "Run the same command on all processes to resume from the last checkpoint."

FIRST_PROCESS_LOST = f"JAX aborted this process: process 0 has ended or cannot be reached. {RESUME_HINT}"
_abort_line = FIRST_PROCESS_LOST


@dataclasses.dataclass(frozen=True)
class ExitReason:
    """Why all processes end.

    Attributes:
        code: Exit code of every process; 0 where the run is done.
        message: The line that each of them prints.
        process: Index of the process whose error it is; None if the message concerns all processes.
    """

    code: int
    message: str = ""
    process: int | None = None

    def to_bytes(self) -> bytes:
        """Return the reason as JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> ExitReason:
        """Read a reason from its JSON."""
        return cls(**json.loads(content))

    def format_line(self, index: int, count: int) -> str:
        """Return the line that process `index` of `count` prints: it names the process unless that is its own error."""
        return self.message if self.process in (None, index) else f"process {self.process} of {count}: {self.message}"


class GroupMonitor:
    """Watches the other processes of a group, and ends this process when the group ends."""

    def __init__(self, store: KeyValueStore, index: int, count: int, limit_s: float):
        """Prepare to watch a group of processes.

        Args:
            store: The store that the processes share.
            index: Index of this process.
            count: Number of processes.
            limit_s: Seconds within which all processes must have ended if one is lost.
        """
        self._store, self._index, self._count = store, index, count
        self._max_silence_s = min(limit_s / 2, MAX_SILENCE_S)
        self._period_s = min(self._max_silence_s / 5, MAX_HEARTBEAT_PERIOD_S)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._exit_lock = threading.Lock()

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def finish(self) -> None:
        """Stop watching on all processes, because the run is done. Call it after a barrier."""
        if self._index == 0:
            self._store.set_if_absent(EXIT_REASON, ExitReason(0).to_bytes())
        self._thread.join()

    def end_all(self, code: int, message: str) -> NoReturn:
        """End this process with one line, and the others with the same line."""
        reason = ExitReason(code, message, self._index)
        self._store.set_if_absent(EXIT_REASON, reason.to_bytes())
        self._exit(reason)

    def exit_if_group_ends(self) -> None:
        """End this process if another one writes an exit reason within a second."""
        with contextlib.suppress(RuntimeError):
            reason = self._read_exit_reason(FAILURE_GRACE_S)
            if reason is not None:
                self._exit(reason)

    def _watch(self) -> None:
        """Send heartbeats until the group ends. Process 0 also writes the exit reason for a process that sends none."""
        heartbeat = 0
        last_seen = {i: (b"", time.monotonic()) for i in range(self._count)}
        while True:
            # If process 0 hangs, the store does not answer.
            with call_if_late(self._max_silence_s, self._exit, self._make_lost_reason(0)):
                try:
                    reason = self._read_exit_reason(self._period_s)
                    heartbeat += 1
                    self._store.set(f"{HEARTBEATS}{self._index}", str(heartbeat).encode(), overwrite=True)
                    heartbeats = self._store.list(HEARTBEATS) if self._index == 0 else {}
                except RuntimeError:  # the service is gone, and JAX aborts this process now
                    return
            if reason is not None:
                if reason.code:
                    self._exit(reason)
                return
            if self._index == 0 and (silent := self._find_silent(heartbeats, last_seen)):
                self._store.set_if_absent(EXIT_REASON, self._make_lost_reason(silent[0]).to_bytes())

    def _find_silent(self, heartbeats: Mapping[str, bytes], last_seen: dict[int, tuple[bytes, float]]) -> list[int]:
        """Return the processes whose heartbeat has not changed for too long; updates `last_seen` (heartbeat, its time)."""
        now = time.monotonic()
        for key, value in heartbeats.items():
            process = int(key.rpartition("/")[2])
            if last_seen[process][0] != value:
                last_seen[process] = (value, now)
        return [process for process, (_, seen) in last_seen.items() if now - seen > self._max_silence_s]

    def _make_lost_reason(self, process: int) -> ExitReason:
        line = f"process {process} of {self._count} has not responded for {self._max_silence_s:g} s. {RESUME_HINT}"
        return ExitReason(1, line)

    def _read_exit_reason(self, timeout_s: float) -> ExitReason | None:
        content = self._store.get(EXIT_REASON, timeout_s)
        return None if content is None else ExitReason.from_bytes(content)

    def _exit(self, reason: ExitReason) -> NoReturn:
        """End the process at once: JAX's regular way to leave a group would wait for the others."""
        self._exit_lock.acquire()  # never released: another thread that is about to end the process waits here
        print_error(reason.format_line(self._index, self._count))
        with contextlib.suppress(OSError, StandardOutputError):
            sys.stdout.flush()
        if self._index == 0:
            time.sleep(LINGER_S)
        os._exit(reason.code)


def print_error(line: str) -> None:
    """Print an error on a separate line, even if a progress bar is shown."""
    print(f"\nerror: {line}", file=LossyStream(sys.stderr), flush=True)


def report_jax_aborts(line: str) -> None:
    """Let this process end with a line if JAX aborts it, because it cannot reach process 0.

    A handler of Python's `signal` module would wait for the main thread, which an abort does not.
    """
    global _abort_line
    _abort_line = line
    _set_abort_handler(_handle_abort)


def stop_reporting_aborts() -> None:
    """Let an abort end this process as usual."""
    _set_abort_handler(ctypes.c_void_p(DEFAULT_HANDLER))


def _set_abort_handler(handler: Any) -> None:
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), handler)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handle_abort(signal_number: int) -> None:
    print_error(_abort_line)
    os._exit(1)
