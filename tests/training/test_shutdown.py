"""The signals that stop a run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from jaxembed.devices import processes
from jaxembed.errors import Stopped
from jaxembed.training import shutdown
from jaxembed.training.shutdown import StopRequest, stop_on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Start with the default handlers, even if the tests were started with ignored signals, and restore them afterwards."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_stop_signal_stops_a_run_after_a_step(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.is_due(1)
        os.kill(os.getpid(), number)
        assert stop.is_due(2) and stop.signal == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_every_stop_signal_ends_a_command_with_a_line(number: int) -> None:
    with pytest.raises(Stopped, match="nothing is lost") as error, stop_on_signals("nothing is lost"):
        os.kill(os.getpid(), number)
    assert error.value.signal == number


def test_ignored_signals_stay_ignored() -> None:
    """`nohup` starts processes that ignore SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop, stop_on_signals("nothing is lost"):
        os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.is_due(1)


def test_with_several_processes_all_signals_become_a_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes, JAX handles SIGTERM and notifies the other processes."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    with StopRequest():
        for number in SIGNALS[2:]:
            os.kill(os.getpid(), number)
    assert received == [signal.SIGTERM] * 3


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_signal_that_is_swallowed_still_ends_the_command(is_stuck: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback of a library may swallow the exception, and the main thread may be stuck in other code than Python's."""
    codes: list[int] = []
    exited = threading.Event()
    monkeypatch.setattr(shutdown, "MAX_UNWINDING_S", 0.05)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), exited.set()))
    with pytest.raises(Stopped, match="nothing is lost"), stop_on_signals("nothing is lost"):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert exited.wait(10 if is_stuck else 0) == is_stuck
    assert codes == [128 + signal.SIGTERM] * is_stuck


def test_a_signal_that_python_ignores_is_sent_again(capfd: pytest.CaptureFixture[str]) -> None:
    """What a finalizer or a callback of the garbage collector raises is printed and ignored."""

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # the handler runs here

    hook = sys.unraisablehook
    with pytest.raises(Stopped, match="nothing is lost") as error, stop_on_signals("nothing is lost"):
        del (finalized := [Finalized()])[0]
        assert not finalized
        time.sleep(10)
        pytest.fail("not interrupted")
    assert error.value.signal == signal.SIGTERM and sys.unraisablehook is hook
    assert capfd.readouterr() == ("", "")


def test_a_run_that_saves_its_state_has_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "MAX_UNWINDING_S", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended before the checkpoint"))
    with stop_on_signals("nothing is lost"), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert stop.is_due(1)
