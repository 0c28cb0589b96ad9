"""Training runs of a tiny model: their files, configs, commands and losses."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers import tiny
from helpers.commands import Process, start_module
from jaxembed import config
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import Stopped
from jaxembed.runs.train import train
from jaxembed.training.metrics import Recorder, read_metrics


def write_base_and_data(root: Path, family: str = "qwen3") -> Path:
    """Write a base of a family, training pairs whose query and positive share words, and a held-out set of the same kind."""
    tiny.write_folder(root / "base", family)
    rng = np.random.default_rng(0)
    letters = [chr(ord("a") + i) * 3 for i in range(26)]
    rows = []
    for _ in range(96):
        words = [letters[i] for i in rng.choice(26, 4, replace=False)]
        rows.append(
            {"query": " ".join(words[:2]), "pos": [" ".join(words)], "neg": [" ".join(letters[i] for i in rng.choice(26, 4))]}
        )
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored_pairs = [
        {"sentence1": r["query"], "sentence2": r["pos"][0] if i % 2 else r["neg"][0], "score": i % 2}
        for i, r in enumerate(rows)
    ]
    (root / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored_pairs))
    return root


def make_config(root: Path, run: str, *overrides: str) -> config.Config:
    """Write the config of a short run on the files of `write_base_and_data`, and load it with overrides."""
    tree = {
        "model": {"base": str(root / "base"), "unroll": False},
        "data": {
            "max_length": 32,
            "hard_negatives": 1,
            "sources": [{"path": str(root / "pairs.jsonl"), "instructions": ["Find it", "Find the text"]}],
        },
        "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
        "train": {"steps": 12, "batch_size": 16, "log_every": 1, "checkpoint_every": 4, "eval_every": 6},
        "eval": {"sets": [{"name": "sts", "kind": "sts", "path": str(root / "sts.jsonl"), "instruction": "Find it"}]},
        "mesh": {"data": 2},
    }
    path = root / f"{run}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return config.load_config(path, [f"run.dir={root / run}", *overrides])


def make_staged_config(root: Path, run: str, stages: Sequence[Mapping[str, Any]], *overrides: str) -> config.Config:
    """Write and load the config of `make_config` with stages."""
    tree = yaml.safe_load(make_config(root, run, *overrides).dump())
    del tree["train"]["steps"]
    tree["stages"] = stages
    path = root / f"{run}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return config.load_config(path)


def copy_run_at_first_checkpoint(finished_run: Path, new_config: config.Config) -> int:
    """Copy a finished run, as it was at its first checkpoint, to the run directory of a config. Return that step."""
    run = Path(new_config.run.dir)
    shutil.copytree(finished_run, run)
    (run / "config.yaml").write_text(new_config.dump())
    first, *later = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    for step in later:
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.rmtree(run / "mined", ignore_errors=True)
    return first


def read_losses(run_dir: Path) -> list[float]:
    """Return the logged training losses of a run."""
    return [row["loss"] for row in read_metrics(run_dir) if "loss" in row]


def start_training(root: Path, run: str, *overrides: str, setup_code: str = "") -> Process:
    """Start the train command on a run's config in the background, after `setup_code` in the same process."""
    make_config(root, run, *overrides)
    arguments = (str(root / f"{run}.yaml"), f"run.dir={root / run}", *overrides)
    return start_module("jaxembed.train", *arguments, setup_code=setup_code)


def train_until_stopped(run_config: config.Config, steps: int) -> None:
    """Train until a SIGTERM during step `steps` stops the run."""
    advance, done = Recorder.advance, 0

    def advance_and_signal(recorder: Recorder) -> None:
        nonlocal done
        advance(recorder)
        done += 1
        if done == steps - 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Recorder, "advance", advance_and_signal)
        train(run_config)


def use_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every module of the package use a mesh of one device, for which programs compile faster."""
    mesh = make_mesh(1)
    for name, module in list(sys.modules.items()):
        if name.startswith("jaxembed.") and getattr(module, "make_mesh", None) is make_mesh:
            monkeypatch.setattr(module, "make_mesh", lambda **_: mesh)
