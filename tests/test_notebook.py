"""Every cell of the notebook runs unchanged on a small part of the data."""

from __future__ import annotations

import json
import os
from pathlib import Path

from helpers.commands import Process
from jaxembed.curation.python_packages import write_package_pairs

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
SMALL = ["data.sources.0.max_examples=256", "data.max_length=32", "train.batch_size=32", "optim.warmup_steps=1"]


def test_every_cell_runs(tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code += "\nassert [len(line.get_xdata()) for line in right.lines] == [5, 2] * 2  # scores and BM25's, of two sets\n"
    write_package_pairs(tmp_path / "data" / "packages", ["optax"], "jaxtyping", 60)
    small = {"STEPS": "4", "RUN": str(tmp_path / "run"), "OVERRIDES": " ".join(SMALL)}
    env = {**os.environ, **small, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "JAXEMBED_CACHE": str(tmp_path / "cache")}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # One device, as a notebook has.
    kernel = Process(f"import os\nos.chdir({str(tmp_path)!r})\n{code}", [], env)
    stdout, stderr = kernel.communicate()
    assert kernel.returncode == 0, stderr[-4000:]
    names = stdout.splitlines()[-1]
    assert names.startswith("['") and names.count(",") == 2
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "export" / "modules.json").is_file()
