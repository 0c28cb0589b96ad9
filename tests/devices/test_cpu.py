"""CPU tuning: the allocator keeps memory between programs, and one switch turns everything off."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import ENV
from helpers.runs import make_config, write_base_and_data


def run_script(code: str, *args: str, **env: str) -> Any:
    """Run Python code in a process of its own and return the JSON that it prints last."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env={**ENV, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


MEMORY_SCRIPT = """
import json, resource
import jax
from jaxembed import cli
from jaxembed.devices.cpu import release_freed_memory, retain_freed_memory

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

cli.set_up_jax()
retain_freed_memory()
x = jax.numpy.arange(1 << 24)
sort = jax.jit(lambda x: jax.numpy.sort(x)[::1000]).lower(x).compile()  # so that memory of the compiler does not count
before = resident_bytes()
sort(x).block_until_ready()
retained = resident_bytes() - before
release_freed_memory()
print(json.dumps([retained, resident_bytes() - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_freed_memory_is_retained_until_released() -> None:
    retained, rest = run_script(MEMORY_SCRIPT, XLA_FLAGS="")
    temporary_bytes = 4 << 24
    assert retained >= temporary_bytes > 3 * rest


STEP_SCRIPT = """
import json, os, sys
from pathlib import Path
import jax
from jaxembed import cli
from jaxembed.config import load_config
from jaxembed.devices import blas
from jaxembed.devices.cpu import get_compiler_options
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics

blas.MIN_FLOPS = 0  # so that the matmuls of a tiny model are large enough
cli.set_up_jax()
config = load_config(sys.argv[1])
train(config)
tuned = {
    "blas": blas._CallState.last_end > 0,
    "compiler options": bool(get_compiler_options()),
    "dispatch": not jax.config.values["jax_cpu_enable_async_dispatch"],
    "threads": "OPENBLAS_THREAD_TIMEOUT" in os.environ,
}
losses = [row["loss"] for row in read_metrics(Path(config.run.dir)) if "loss" in row]
print(json.dumps({"tuned": tuned, "losses": losses}))
"""


def test_a_step_computes_the_same_loss_with_tuning_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ENV, "OPENBLAS_THREAD_TIMEOUT", raising=False)  # set when this process imported the package
    write_base_and_data(tmp_path)
    results = {}
    for switch in ("on", "off"):
        config = make_config(tmp_path, switch, "train.steps=2", "mesh.data=1", "eval.sets=[]")
        path = tmp_path / f"{switch}.yaml"
        path.write_text(config.dump())
        results[switch] = run_script(STEP_SCRIPT, str(path), JAXEMBED_CPU_TUNING=switch)
    assert set(results["on"]["tuned"].values()) == {True}, results["on"]
    assert set(results["off"]["tuned"].values()) == {False}, results["off"]
    assert len(results["on"]["losses"]) == 2
    np.testing.assert_allclose(results["off"]["losses"], results["on"]["losses"], rtol=1e-5)
