"""Run scripts in their own processes, and measure memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent


def run_script(command: list[str]) -> tuple[dict[str, Any], float]:
    """Run a Python script. Exit if it fails.

    Args:
        command: Arguments of the interpreter: the script and its arguments.

    Returns:
        The JSON object on the last line that the script prints, and the peak memory of its process in GiB.
    """
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(lines[-1]), usage.ru_maxrss / 2**20


def read_peak_gib() -> float:
    """Return the peak memory of this process so far in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
