"""Running the launch scripts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = ["configs/lora.yaml", "model.base=my base", """model.query_suffix="it's\\n" """]


def launch(name: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(["bash", f"launch/{name}.sh", *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def split_commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines()]
