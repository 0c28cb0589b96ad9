"""How processes join, and which errors say that another one is gone, with stand-ins for JAX."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from helpers.commands import ENV
from jaxembed.devices import processes
from jaxembed.devices.processes import check_same_count, is_connection_error
from jaxembed.errors import UserError
from jaxembed.training.checkpoint import Checkpoints


def run_with_variables(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**ENV, **variables}, capture_output=True, text=True, check=False)


JOIN = "from jaxembed.devices.processes import _join\n_join(30)"


def test_a_port_in_use_is_reported_before_jax_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        line = rf"^JAX_COORDINATOR_ADDRESS: port {address[10:]} cannot be used \(Address already in use\)\. Name a free port\.$"
        with pytest.raises(UserError, match=line):
            processes._join(5)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:x", "host:99999"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"^JAX_COORDINATOR_ADDRESS: '.*' is not an address \(expected HOST:PORT\)"):
        processes._check_port_is_free(address)


def test_an_incomplete_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX raises a KeyError, or ConfigException of the Kubernetes client, where a pod lacks what it expects."""

    def fail(**options: Any) -> None:
        raise KeyError("JOB_COMPLETION_INDEX")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(processes, "report_jax_aborts", lambda line: None)
    monkeypatch.setattr(processes, "stop_reporting_aborts", lambda: None)
    with pytest.raises(UserError, match=r"could not join \(.*JOB_COMPLETION_INDEX.*\)\. Set JAX_COORDINATOR_ADDRESS"):
        processes._join(30)


def test_an_abort_while_joining_is_one_line() -> None:
    code = "import os, jax\njax.distributed.initialize = lambda **_: os.abort()\n" + JOIN
    done = run_with_variables(code, JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: the processes could not join in 30 s: another one has ended, or was not")


def test_a_long_wait_is_logged_and_can_be_aborted() -> None:
    code = (
        "import os, time, jax, logging\nfrom jaxembed.devices import processes\nlogging.basicConfig(format='%(message)s')\n"
        "processes.JOIN_REMINDER_S = 0.1\ndef wait(**_):\n    time.sleep(1)\n    raise ValueError('no cluster')\n"
        "jax.distributed.initialize = wait\nprocesses._join(30)\nos.abort()"
    )
    done = run_with_variables(code)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.splitlines()[0] == "waiting up to 30 s for the other processes to start"


def test_processes_with_different_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, bytes] = {}
    store: Any = SimpleNamespace(set_if_absent=values.setdefault, get=lambda key, timeout_s: values.get(key))
    check_same_count(store, 2, 0.1)
    monkeypatch.setattr(processes._group, "index", 1)
    check_same_count(store, 2, 0.1)
    with pytest.raises(UserError, match=r"^JAX_NUM_PROCESSES: this process was started as one of 3, process 0 as one of 2\."):
        check_same_count(store, 3, 0.1)


def test_a_lost_process_during_a_checkpoint_is_not_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("UNAVAILABLE: connection reset by peer")
    assert not is_connection_error(error), "a process that runs alone has a file system that is not available"
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert is_connection_error(error) and is_connection_error(RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"))
    assert is_connection_error(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    assert not is_connection_error(RuntimeError("RESOURCE_EXHAUSTED: No space left on device"))
    assert not is_connection_error(OSError("UNAVAILABLE"))

    def fail() -> None:
        raise error

    checkpoints = Checkpoints.__new__(Checkpoints)
    monkeypatch.setattr(checkpoints, "_manager", SimpleNamespace(wait_until_finished=fail, close=lambda: None), raising=False)
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        checkpoints.close()
