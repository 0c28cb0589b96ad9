"""Every cell of the notebook runs as it stands, on a small part of the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
SMALL = [
    "data.python_packages.packages=[optax]", "data.python_packages.holdout_package=jaxtyping",
    "data.python_packages.holdout_functions=60", "data.sources.0.max_examples=256", "data.max_length=32",
    "train.batch_size=32", "optim.warmup_steps=1",
]  # fmt: skip


def test_every_cell_runs(tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code += "\nassert [len(line.get_xdata()) for line in right.lines] == [5, 2] * 2  # scores and BM25's, of two sets\n"
    small = {"STEPS": "4", "RUN": str(tmp_path / "run"), "OVERRIDES": " ".join(s.replace(" ", "") for s in SMALL)}
    env = {**os.environ, **small, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "JAXEMBED_CACHE": str(tmp_path / "cache")}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, as a notebook has
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = done.stdout.splitlines()[-1]
    assert found.startswith("['") and found.count(",") == 2
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "export" / "modules.json").is_file()
