"""Ways to end a run from outside the loop: a signal, or a step that does not finish in time."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType

from jaxembed.devices import processes
from jaxembed.devices.deadline import call_if_late
from jaxembed.devices.group_exit import print_error
from jaxembed.errors import Stopped, interrupt_signal

RESUME_MESSAGE = "the run continues from its last checkpoint, if it has one. Run the same command."


def stop_signals() -> list[int]:
    """Return the signals that ask a command to stop: Ctrl-C, SIGTERM, and these if they are not ignored.

    - SIGHUP: the terminal was closed. `nohup` has it ignored.
    - SIGUSR1 and SIGUSR2: Slurm's `--signal` sends them before the time limit.
    """
    optional = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    return [signal.SIGINT, signal.SIGTERM, *(n for n in optional if signal.getsignal(n) != signal.SIG_IGN)]


@contextmanager
def handle_stop_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle `stop_signals` inside the block, and restore the previous handlers at its end.

    With several processes JAX handles SIGTERM, to notify the others, so that signal is left to it. Outside the main thread
    Python accepts no handlers, and signals keep their meaning.

    Args:
        handle: Called with the number of the signal and the interrupted frame.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in stop_signals() if number != signal.SIGTERM or processes.count() == 1] if is_main else []
    previous = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals(message: str) -> Iterator[None]:
    """Turn `stop_signals` inside the block into `Stopped` with a message.

    A process of a group cannot stop alone: there the signals keep the meaning that they have outside the block.
    """
    if processes.count() > 1:
        yield
        return
    with handle_stop_signals(_interrupt):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise Stopped(message, interrupt_signal(interrupt)) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number))  # libraries that catch `Exception` do not catch it


class StopRequest:
    """Turns `stop_signals` into a request to stop after a step. A second Ctrl-C interrupts at once.

    It is a context manager: the signals are handled inside the block (`handle_stop_signals`). With several processes the
    signals are turned into a SIGTERM, which JAX handles.

    Attributes:
        signal: The signal that requested the stop; 0 without one.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._handlers = handle_stop_signals(self._handle)

    def __enter__(self) -> StopRequest:
        self._handlers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handlers.__exit__(kind, error, trace)

    def is_due(self, step: int) -> bool:
        """Return whether to stop after this step: the same answer on all processes of a run."""
        if processes.count() == 1:
            return bool(self.signal)
        if processes.should_stop_at(step):
            self.signal = signal.SIGTERM
        return self.signal == signal.SIGTERM

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            _interrupt(number, frame)
        self.signal = number
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


def must_finish(name: str, limit_s: float) -> AbstractContextManager[None]:
    """Return a context that ends the process if its block takes too long: exit code 1, and the stacks of all threads.

    Args:
        name: What the error calls the block.
        limit_s: Seconds that the block may take.
    """
    return call_if_late(limit_s, _exit_with_stacks, name, limit_s)


def _exit_with_stacks(name: str, limit_s: float) -> None:
    print_error(f"{name} did not finish in {limit_s:g} s (train.stall_timeout_s). Stacks of all threads:")
    faulthandler.dump_traceback(file=2)
    os._exit(1)
