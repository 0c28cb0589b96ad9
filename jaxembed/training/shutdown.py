"""Ways to end a run from outside the loop: a signal, or a step that does not finish in time."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType

from jaxembed.devices import processes
from jaxembed.devices.deadline import call_if_late
from jaxembed.devices.group_exit import print_error
from jaxembed.devices.standard_streams import LossyStream
from jaxembed.errors import Stopped, get_interrupt_signal

MAX_UNWINDING_S = 20.0  # for an interrupted block to clean up and end
RESEND_DELAY_S = 0.05  # before a signal is sent again
RESUME_MESSAGE = "the run continues from its last checkpoint, if it has one. Run the same command."


def list_stop_signals() -> list[int]:
    """Return the signals that ask a command to stop: Ctrl-C, SIGTERM, and these if they are not ignored.

    - SIGHUP: the terminal was closed. `nohup` ignores it.
    - SIGUSR1 and SIGUSR2: Slurm's `--signal` sends them before the time limit.
    """
    optional = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    return [signal.SIGINT, signal.SIGTERM, *(n for n in optional if signal.getsignal(n) != signal.SIG_IGN)]


@contextmanager
def handle_stop_signals(handle: Callable[[int, FrameType | None], None], wakeup_descriptor: int = -1) -> Iterator[None]:
    """Handle `list_stop_signals` inside the block, and restore the previous handlers at its end.

    With several processes JAX handles SIGTERM, to notify the others, so that signal is left to it. Outside the main thread
    Python accepts no handlers, and signals keep their meaning.

    Args:
        handle: Called in the main thread with the number of the signal and the interrupted frame, once Python code runs there.
        wakeup_descriptor: Gets the number of a signal at once, as a byte (`signal.set_wakeup_fd`). Default: none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled_signals = [number for number in list_stop_signals() if number != signal.SIGTERM or processes.count() == 1]
    previous = {number: signal.signal(number, handle) for number in handled_signals}
    previous_descriptor = signal.set_wakeup_fd(wakeup_descriptor, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_descriptor, warn_on_full_buffer=False)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals(message: str) -> Iterator[None]:
    """Raise `Stopped` with a message when a signal of `list_stop_signals` arrives inside the block.

    A signal raises `KeyboardInterrupt` in the main thread:

    - This can take long, for example while a program compiles, and callbacks of libraries may swallow the exception. So the
      process ends with the message if the block has not ended after `MAX_UNWINDING_S`.
    - Python itself ignores the exception in finalizers and callbacks of the garbage collector. Then the signal is sent again.

    A process of a group cannot stop alone: there, signals keep the meaning that they have outside the block.
    """
    if processes.count() > 1:
        yield
        return
    received_signals: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received_signals.append(number)
        raise KeyboardInterrupt(number)  # libraries that catch `Exception` do not catch it

    with (
        _exit_if_stuck(message) as wakeup_descriptor,
        handle_stop_signals(interrupt, wakeup_descriptor),
        _send_again_if_ignored(),
    ):
        try:
            yield
        except KeyboardInterrupt as error:
            raise Stopped(message, get_interrupt_signal(error)) from None
        if received_signals:
            raise Stopped(message, received_signals[0])


@contextmanager
def _send_again_if_ignored() -> Iterator[None]:
    """Send a signal again if Python ignores its `KeyboardInterrupt`, which it would otherwise print with a traceback."""
    previous, timers = sys.unraisablehook, list[threading.Timer]()

    def handle(ignored: sys.UnraisableHookArgs) -> None:
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            previous(ignored)
            return
        # A timer, because Python would ignore an exception that is raised here too.
        timers.append(threading.Timer(RESEND_DELAY_S, os.kill, (os.getpid(), get_interrupt_signal(ignored.exc_value))))
        timers[-1].start()

    sys.unraisablehook = handle
    try:
        yield
    finally:
        sys.unraisablehook = previous
        for timer in timers:
            timer.cancel()


@contextmanager
def _exit_if_stuck(message: str) -> Iterator[int]:
    """Yield a descriptor for the numbers of signals. End the process if the block does not end soon after one."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    has_ended = threading.Event()

    def watch() -> None:
        with open(read_end, "rb", buffering=0) as signals:
            while number := signals.read(1):  # nothing once the block has ended
                if number[0] in list_stop_signals() and not has_ended.wait(MAX_UNWINDING_S):
                    print(f"\nstopped: {message}", file=LossyStream(sys.stderr), flush=True)
                    os._exit(128 + number[0])

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield write_end
    finally:
        has_ended.set()
        os.close(write_end)


class StopRequest:
    """Takes a signal of `list_stop_signals` as a request to stop after the step. A second Ctrl-C interrupts at once.

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
        """Return whether to stop after this step. All processes of a run get the same answer."""
        if processes.count() == 1:
            return bool(self.signal)
        if processes.should_stop_at(step):
            self.signal = signal.SIGTERM
        return self.signal == signal.SIGTERM

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self.signal = number
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


def must_finish(name: str, limit_s: float) -> AbstractContextManager[None]:
    """Return a context that ends the process if its block takes too long: exit code 1, and the stacks of all threads.

    Args:
        name: Name of the block in the error.
        limit_s: Seconds that the block may take.
    """
    return call_if_late(limit_s, _exit_with_stacks, name, limit_s)


def _exit_with_stacks(name: str, limit_s: float) -> None:
    print_error(f"{name} did not finish in {limit_s:g} s (train.stall_timeout_s). Stacks of all threads:")
    faulthandler.dump_traceback(file=2)
    os._exit(1)
