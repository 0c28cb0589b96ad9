"""The local pod: processes on this machine that train as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.launch_scripts import ROOT, TRAIN, launch, split_commands


def test_local_pod_processes_join_one_mesh(tmp_path):
    (tmp_path / "join.py").write_text(
        "import os, sys\nimport jax\n"
        "jax.distributed.initialize(None, int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID']))\n"
        "sharding = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ('data',)), jax.P('data'))\n"
        "ones = jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: jax.numpy.ones(1))\n"
        "total = jax.jit(jax.numpy.sum)(ones)\n"
        "print(jax.local_device_count(), float(total), sys.argv[1])\n"
        "print('from', jax.process_index(), file=sys.stderr)\n"
    )
    done = launch("local_pod", "--module", "join", "2", "3", "--", "a b", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "3 6.0 a b"), done.stderr  # lines of Gloo come first
    assert {"from 0", "[1] from 1"} <= set(done.stderr.splitlines())


WAIT_SCRIPT = r"""
import os, signal, sys, time
process_id = int(os.environ["JAX_PROCESS_ID"])
def stop(number, frame):
    os.write(2, b"saved\n")  # one write, so that lines do not mix
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if sys.argv[1] == "fail":
    path = os.path.join(os.path.dirname(__file__), "pid")
    if process_id == 1:
        with open(path + ".partial", "w") as file:
            file.write(str(os.getpid()))
        os.rename(path + ".partial", path)
    while process_id == 2:  # until the script has seen the end of process 1
        try:
            os.kill(int(open(path).read()), 0)
        except FileNotFoundError:
            pass
        except ProcessLookupError:
            break
        time.sleep(0.01)
    sys.exit([0, 3, 4][process_id])
open(f"{sys.argv[1]}/ready-{process_id}", "w").close()
time.sleep(600)
"""


def test_local_pod_exits_with_the_code_of_the_first_failure(tmp_path):
    (tmp_path / "wait.py").write_text(WAIT_SCRIPT)
    done = launch("local_pod", "--module", "wait", "3", "1", "--", "fail", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_pod_forwards_signals_to_all_processes(number, tmp_path):
    (tmp_path / "wait.py").write_text(WAIT_SCRIPT)
    # A shell that runs the tests in the background makes its children ignore Ctrl-C.
    reset_sigint = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv)"
    pod_of_three = ["launch/local_pod.sh", "--module", "wait", "3", "1", "--", str(tmp_path)]
    command = [sys.executable, "-c", reset_sigint, *pod_of_three]
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    pod = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("ready-*"))) < 3:
        assert pod.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(pod.pid, number)  # a terminal sends Ctrl-C to the whole group
    _, stderr = pod.communicate(timeout=300)
    assert pod.returncode == 128 + number
    assert sorted(line for line in stderr.splitlines() if "saved" in line) == ["[1] saved", "[2] saved", "saved"]


def test_local_pod_dry_run():
    lines = split_commands(launch("local_pod", "--dry-run", "2", "4", "--", *TRAIN, XLA_FLAGS="--other").stdout)
    assert [line[line.index("-m") :] for line in lines] == [["-m", "jaxembed.train", *TRAIN]] * 2
    environments = [dict(word.split("=", 1) for word in line[1:6]) for line in lines]
    assert [e["JAX_PROCESS_ID"] for e in environments] == ["0", "1"]
    for e in environments:
        assert (e["JAX_PLATFORMS"], e["JAX_NUM_PROCESSES"]) == ("cpu", "2")
        assert e["XLA_FLAGS"] == "--other --xla_force_host_platform_device_count=4"
        assert e["JAX_COORDINATOR_ADDRESS"] == environments[0]["JAX_COORDINATOR_ADDRESS"]
