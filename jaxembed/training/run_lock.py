"""The lock of a run directory: only one job trains in it at a time, also where several machines share the disk.

The lock is the file `lock` in the directory. It names its owner, whose thread rewrites it every few seconds (a heartbeat). A
crash leaves the file behind. Then another job takes over the lock:

- From the same machine: at once, if the owner's process has ended.
- From another machine: after the heartbeat has not changed for `MAX_LOCK_SILENCE_S`. Clocks are not compared: they may differ.

An owner that loses its lock, because it was suspended for longer, ends with one line as soon as it notices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from jaxembed.config.fields import Fields
from jaxembed.devices.group_exit import print_error
from jaxembed.errors import UserError

log = logging.getLogger("jaxembed")

RUN_LOCK_FILE = "lock"
HEARTBEAT_PERIOD_S = 5.0
MAX_LOCK_SILENCE_S = 60.0
LOCK_POLL_INTERVAL_S = 0.5


@dataclasses.dataclass(frozen=True)
class LockOwner:
    """The process that has a lock.

    Attributes:
        host: Name of its machine.
        pid: Its process id.
        since: Time when it took the lock, for messages.
        pid_space: Identifies the boot and the container to which `pid` belongs; empty if the system does not say.
        process_start: Start time of the process, in ticks since that boot. It distinguishes processes that reuse an id.
        token: Random text, unique to this owner.
    """

    host: str
    pid: int
    since: str
    pid_space: str
    process_start: str
    token: str

    @classmethod
    def this_process(cls) -> LockOwner:
        """Return a new owner for this process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            pid_space=_find_pid_space(),
            process_start=_find_process_start(os.getpid()),
            token=uuid.uuid4().hex,
        )

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended. It is not known for a process of another machine."""
        return self._is_on_this_machine() and _find_process_start(self.pid) != self.process_start

    def is_running(self) -> bool:
        """Return whether the process is known to run. It is not known for a process of another machine."""
        return self._is_on_this_machine() and _find_process_start(self.pid) == self.process_start

    def _is_on_this_machine(self) -> bool:
        return bool(self.pid_space) and self.pid_space == _find_pid_space()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


class RunLock:
    """The lock of a run directory. It is released when the `with` block ends; `acquire` takes it inside the block."""

    def __init__(self, run_dir: Path):
        self._run_dir, self._path = run_dir, run_dir / RUN_LOCK_FILE
        self._owner = LockOwner.this_process()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def acquire(self) -> None:
        """Take the lock. The run directory must exist.

        Raises:
            UserError: Another job is training in the directory.
            OSError: The directory cannot be written.
        """
        content = self._format_content(0)
        if not _create(self._path, content):
            self._wait_until_abandoned()
            # Of several jobs that take over an abandoned lock, the last to write has it.
            _replace(self._path, content)
            time.sleep(LOCK_POLL_INTERVAL_S)
            if not self._is_ours():
                raise _make_occupied_error(self._run_dir, _read(self._path))
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._thread.start()

    def _wait_until_abandoned(self) -> None:
        """Wait until the lock is known to be abandoned. Raise `UserError` as soon as its owner is known to run."""
        # On this machine, the owner's process tells.
        check_unlocked(self._run_dir)
        if not _read(self._path):  # another process may be creating it
            time.sleep(LOCK_POLL_INTERVAL_S)
            check_unlocked(self._run_dir)
        first = last = _read(self._path)
        owner = _parse(first)
        if not first or (owner is not None and owner.has_ended()):
            return
        # On another machine, only its heartbeats tell.
        line = "%s: waiting up to %g s to see whether %s still trains here"
        log.warning(line, self._run_dir, MAX_LOCK_SILENCE_S, owner or "another process")
        start = time.monotonic()
        while last and time.monotonic() - start < MAX_LOCK_SILENCE_S:
            if last != first:
                raise _make_occupied_error(self._run_dir, last)
            time.sleep(LOCK_POLL_INTERVAL_S)
            last = _read(self._path)

    def _send_heartbeats(self) -> None:
        count = 0
        while not self._released.wait(HEARTBEAT_PERIOD_S):
            count += 1
            with contextlib.suppress(OSError):  # a disk may fail for a while
                content = _read(self._path)
                if content and not self._is_ours(content):
                    print_error(
                        f"{self._run_dir}: {_parse(content) or 'another process'} continues this run, because this process did "
                        f"not respond for {MAX_LOCK_SILENCE_S:g} s."
                    )
                    os._exit(1)
                if not content:
                    _create(self._path, self._format_content(count))
                else:
                    _overwrite(self._path, self._format_content(count))

    def _is_ours(self, content: bytes | None = None) -> bool:
        owner = _parse(_read(self._path) if content is None else content)
        return owner is not None and owner.token == self._owner.token

    def _format_content(self, heartbeat: int) -> bytes:
        return json.dumps({**dataclasses.asdict(self._owner), "heartbeat": f"{heartbeat:09}"}).encode()


def check_unlocked(run_dir: Path) -> None:
    """Raise `UserError` if a process of this machine has the lock of a run directory."""
    content = _read(run_dir / RUN_LOCK_FILE)
    owner = _parse(content)
    if owner is not None and owner.is_running():
        raise _make_occupied_error(run_dir, content)


def _make_occupied_error(run_dir: Path, content: bytes) -> UserError:
    owner = _parse(content) or "another process"
    return UserError(f"{run_dir}: {owner} is training in this run directory. Stop it, or name another run.dir.")


def _create(path: Path, content: bytes) -> bool:
    """Create a file with some content; return whether it did not exist yet.

    Where the disk has hard links, no other process ever sees the file without its content.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return _create_without_link(path, content)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _create_without_link(path: Path, content: bytes) -> bool:
    """Do the same on a disk without hard links."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _overwrite(path: Path, content: bytes) -> None:
    """Write content of the same length over a file, in one call, without ever truncating it."""
    descriptor = os.open(path, os.O_WRONLY)
    with open(descriptor, "wb", buffering=0) as file:
        file.write(content)


def _replace(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _read(path: Path) -> bytes:
    """Return the content of the lock file; empty if there is none. Opening it makes a network disk fetch its newest state."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _parse(content: bytes) -> LockOwner | None:
    """Return the owner that a lock file names, or None if the file is incomplete."""
    try:
        fields = Fields(json.loads(content), RUN_LOCK_FILE)
        names = [field.name for field in dataclasses.fields(LockOwner) if field.name != "pid"]
        return LockOwner(pid=fields.integer("pid"), **{name: fields.string(name) for name in names})
    except (ValueError, AttributeError, UserError):
        return None


def _find_pid_space() -> str:
    """Return what identifies the boot and the container of this process on Linux, empty elsewhere."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _find_process_start(pid: int) -> str:
    """Return when a process started, in ticks since the boot; empty if it does not run, or has ended as a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
