"""The lock of a run directory: one job at a time, also on a shared disk, and released by a crash."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from helpers.commands import ENV
from jaxembed.config import load_config
from jaxembed.errors import UserError
from jaxembed.training import run_lock
from jaxembed.training.run_dir import check_run_dir, create_run_dir
from jaxembed.training.run_lock import RUN_LOCK_FILE, LockOwner, RunLock

HOLD_LOCK = """
import sys, time
from pathlib import Path
from jaxembed.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.acquire()
    print("locked", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make heartbeats and waits short."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_PERIOD_S", 0.05)
    monkeypatch.setattr(run_lock, "LOCK_POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(run_lock, "MAX_LOCK_SILENCE_S", 0.5)


def start_owner(run_dir: Path) -> subprocess.Popen[str]:
    """Start a process that acquires the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(run_dir)], env=ENV, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def write_foreign_lock(run_dir: Path, heartbeat: int) -> None:
    """Write the lock of a process on another machine."""
    owner = dataclasses.replace(LockOwner.this_process(), host="far", pid=7, pid_space="other boot", token="far")
    (run_dir / RUN_LOCK_FILE).write_text(json.dumps({**dataclasses.asdict(owner), "heartbeat": heartbeat}))


@pytest.mark.parametrize("code", [0, errno.EPERM])
def test_a_lock_that_another_process_is_creating_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On a disk without hard links it exists for a moment without its content."""
    path, content = tmp_path / RUN_LOCK_FILE, RunLock(tmp_path)._format_content(0)
    path.touch()
    monkeypatch.setattr("time.sleep", lambda seconds: path.write_bytes(content))
    if code:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with RunLock(tmp_path) as lock, pytest.raises(UserError, match="is training in this run directory"):
        lock.acquire()
    assert path.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == [RUN_LOCK_FILE]
    path.unlink()
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_second_job_is_refused_and_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "MAX_LOCK_SILENCE_S", 600)
    first = start_owner(tmp_path)
    try:
        line = rf"^{tmp_path}: process {first.pid} on .+ \(since 20.+\) is training in this run directory\. Stop it, or name"
        with RunLock(tmp_path) as lock, pytest.raises(UserError, match=line):
            lock.acquire()
        assert (tmp_path / RUN_LOCK_FILE).exists(), "a refused job does not release the lock of the other process"
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with RunLock(tmp_path) as lock:
        start = time.monotonic()
        lock.acquire()  # at once, as the process has ended
        assert time.monotonic() - start < 300
    assert not list(tmp_path.iterdir())


def test_a_zombie_process_does_not_own_the_lock(tmp_path: Path) -> None:
    first = start_owner(tmp_path)
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with RunLock(tmp_path) as lock:
        lock.acquire()
    first.communicate()


def test_another_process_with_the_same_id_is_not_the_owner(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        lock.acquire()
        content = json.loads((tmp_path / RUN_LOCK_FILE).read_text())
    assert content["pid"] == os.getpid()
    (tmp_path / RUN_LOCK_FILE).write_text(json.dumps(content | {"process_start": "1"}))
    with RunLock(tmp_path) as lock:
        lock.acquire()


def test_a_lock_of_another_machine_is_taken_over_once_its_heartbeat_stops(tmp_path: Path) -> None:
    write_foreign_lock(tmp_path, 0)
    start = time.monotonic()
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert time.monotonic() - start >= 0.5
        assert json.loads((tmp_path / RUN_LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_with_heartbeats_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "MAX_LOCK_SILENCE_S", 600)
    write_foreign_lock(tmp_path, 0)
    timer = threading.Timer(0.2, write_foreign_lock, [tmp_path, 1])
    timer.start()
    with RunLock(tmp_path) as lock, pytest.raises(UserError, match=r"process 7 on far \(since .*\) is training"):
        lock.acquire()
    timer.join()
    assert json.loads((tmp_path / RUN_LOCK_FILE).read_text())["host"] == "far"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_damaged_lock_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RUN_LOCK_FILE).write_bytes(content)
    with RunLock(tmp_path) as lock:
        lock.acquire()


def test_heartbeats_change_the_file_and_restore_it(tmp_path: Path) -> None:
    path = tmp_path / RUN_LOCK_FILE
    with RunLock(tmp_path) as lock:
        lock.acquire()
        first = path.read_bytes()
        while path.read_bytes() == first:
            time.sleep(0.01)
        assert len(path.read_bytes()) == len(first)
        path.unlink()
        while not path.exists():
            time.sleep(0.01)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_owner_that_lost_its_lock_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ended = threading.Event()

    def exit(code: int) -> None:
        assert code == 1
        ended.set()
        raise SystemExit  # ends the thread

    monkeypatch.setattr(run_lock.os, "_exit", exit)
    with RunLock(tmp_path) as lock:
        lock.acquire()
        write_foreign_lock(tmp_path, 0)
        assert ended.wait(300)
    assert "process 7 on far" in capsys.readouterr().err
    assert (tmp_path / RUN_LOCK_FILE).exists(), "the lock of the other process stays"


def test_a_run_directory_is_locked_as_it_is_created(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": "preset:tiny"}, "data": {"sources": [{"path": "a.jsonl"}]}}))
    config = load_config(path, [f"run.dir={tmp_path / 'run'}"])
    with RunLock(tmp_path / "run") as lock:
        create_run_dir(config, lock)
        check_run_dir(config)  # a directory with a config and a lock is not a run yet
        (tmp_path / "run" / "base.json").write_text("{}")
        with pytest.raises(UserError, match="is training in this run directory"):
            check_run_dir(config)
    check_run_dir(config)
