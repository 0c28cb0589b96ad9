"""Why and how the processes of a group end, with a store in memory in place of JAX's."""

from __future__ import annotations

import time
from typing import Any

import pytest

from jaxembed.devices import group_exit
from jaxembed.devices.group_exit import EXIT_REASON, ExitReason, GroupMonitor


class MemoryStore:
    """A `KeyValueStore` in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes, overwrite: bool = False) -> None:
        assert overwrite or key not in self.values
        self.values[key] = value

    def set_if_absent(self, key: str, value: bytes) -> None:
        self.values.setdefault(key, value)

    def get(self, key: str, timeout_s: float) -> bytes | None:
        if key not in self.values:
            time.sleep(timeout_s)
        return self.values.get(key)

    def list(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self.values.items() if key.startswith(prefix)}


class Exited(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record exit codes instead of ending the test process."""
    codes: list[int] = []

    def exit(code: int) -> None:
        codes.append(code)
        raise Exited

    monkeypatch.setattr(group_exit.os, "_exit", exit)
    monkeypatch.setattr(group_exit, "LINGER_S", 0.0)
    return codes


def make_monitor(store: Any, index: int, limit_s: float = 100.0) -> GroupMonitor:
    return GroupMonitor(store, index, 2, limit_s)


def test_the_first_error_ends_all_processes_with_the_same_line(exits: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    store = MemoryStore()
    with pytest.raises(Exited):
        make_monitor(store, 0).end_all(2, "the loss is not finite")
    with pytest.raises(Exited):
        make_monitor(store, 1).exit_if_group_ends()
    assert exits == [2, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines == ["error: the loss is not finite", "error: process 0 of 2: the loss is not finite"]


def test_a_process_names_itself_to_the_others_only() -> None:
    """Its own monitor may read the reason before its main thread prints it: the line is the same."""
    reason = ExitReason.from_bytes(ExitReason(1, "no such file", process=1).to_bytes())
    assert [reason.format_line(i, 2) for i in (0, 1)] == ["process 1 of 2: no such file", "no such file"]


def test_the_first_process_reports_one_without_heartbeats(exits: list[int]) -> None:
    store = MemoryStore()
    with pytest.raises(Exited):
        make_monitor(store, 0, limit_s=0.4)._watch()
    assert exits == [1]
    reason = ExitReason.from_bytes(store.values[EXIT_REASON])
    assert reason.message.startswith("process 1 of 2 has not responded for 0.2 s.")


def test_a_group_that_is_done_ends_without_an_exit(exits: list[int]) -> None:
    store = MemoryStore()
    monitors = [make_monitor(store, i, limit_s=1.0) for i in range(2)]
    for monitor in monitors:
        monitor.start()
    for monitor in monitors:
        monitor.finish()
    assert not exits
