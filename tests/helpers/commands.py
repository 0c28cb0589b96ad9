"""Commands of the package in processes of their own, which start fast.

Python, JAX, Orbax and transformers take about eight seconds of CPU time to import, more than most commands need for the rest.
Here a server imports them once and forks itself for each command. Arguments, environment, standard streams, signals, and exit
codes are those of any process.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
# The compiler of TPUs (libtpu) refuses the flags of CPUs.
TPU_COMPILER_ENV = {name: value for name, value in ENV.items() if name != "XLA_FLAGS"}
SERVER_PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers.preload"])


class Process:
    """A process that runs Python code. It has the methods of `subprocess.Popen` that tests need."""

    def __init__(self, code: str, arguments: Sequence[str], env: Mapping[str, str] = ENV):
        self._folder = tempfile.TemporaryDirectory(prefix="jaxembed-streams-")
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._streams:
            path.touch()
        self._process = CONTEXT.Process(target=run_code, args=(code, list(arguments), dict(env), self._streams), daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", SERVER_PATH)  # for the server, which the first process starts
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        """Return what the process has written to standard output so far."""
        return self._streams[0].read_text()

    def last_output_time(self) -> float:
        """Return when the process last wrote to a stream (`time.time`)."""
        return max(path.stat().st_mtime for path in self._streams)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the process. Return what it wrote to standard output and to standard error."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("process", timeout or 0)
        out, err = (path.read_text() for path in self._streams)
        return out, err


def run_code(code: str, arguments: Sequence[str], env: Mapping[str, str], streams: Sequence[Path]) -> None:
    """Run code as `python -c CODE ARGUMENTS` does, with standard output and standard error in files."""
    for number, path in enumerate(streams, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a forked process skips them


def run_module(name: str) -> str:
    """Return code that does what `python -m NAME` does."""
    # The server may have imported the module, of which runpy would warn.
    return (
        f"import runpy, sys\nsys.modules.pop({name!r}, None)\nrunpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    )


def start_module(name: str, *arguments: str, env: Mapping[str, str] = ENV, setup_code: str = "") -> Process:
    """Start `python -m NAME ARGUMENTS` in the background, after `setup_code` in the same process."""
    return Process(f"{setup_code}\n{run_module(name)}", arguments, env)


def run_command(name: str, *arguments: str, env: Mapping[str, str] = ENV) -> subprocess.CompletedProcess[str]:
    """Run a module of the package in a new process, and wait for it."""
    process = start_module(name, *arguments, env=env)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess([name, *arguments], process.returncode, out, err)
