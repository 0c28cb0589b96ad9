"""What ends a run from outside the loop: a signal, or a step that never finishes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from jaxembed.devices import processes


class StopRequest:
    """While entered, SIGTERM and the first Ctrl-C only set `signal`; a second Ctrl-C interrupts at once.

    Outside the main thread Python takes no handlers, and signals do what they did before. Of several processes JAX takes
    SIGTERM, to tell the others of it; a Ctrl-C is a SIGTERM there.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            taken = (signal.SIGTERM, signal.SIGINT) if processes.count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._note) for number in taken}
        return self

    def due(self, step: int) -> bool:
        """Whether to stop after a step: the same for all processes of a run."""
        if processes.count() > 1 and processes.asked_to_stop(step):
            self.signal = signal.SIGTERM
        return bool(self.signal) if processes.count() == 1 else self.signal == signal.SIGTERM

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def must_finish(what: str, limit_s: float) -> Iterator[None]:
    """Ends the process with exit code 1 and the stacks of its threads if the block takes longer than `limit_s` seconds."""
    timer = threading.Timer(limit_s, _give_up, [what, limit_s])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(what: str, limit_s: float) -> None:
    told = f"error: {what} did not finish in {limit_s:g} s (train.stall_timeout_s); the stacks of all threads:"
    print(f"\n{told}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=2)
    os._exit(1)
