"""Recipes train end to end on a tiny base and generated rows: every stage, with only base, paths, steps and batch replaced."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers.commands import TPU_COMPILER_ENV, run_command
from helpers.recipes import NAMES, make_short_run, write_base, write_rows
from helpers.runs import read_losses, use_one_device
from jaxembed.runs.train import train

# Two stages, labels, entailment, BEIR folders, and Matryoshka widths; texts alone. `pytest -m all_recipes` runs the others.
SAMPLE = ("gecko", "llm2vec_simcse")


@pytest.fixture(scope="module")
def base_and_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Path]]:
    root = tmp_path_factory.mktemp("recipes")
    return write_base(root / "base"), write_rows(root / "rows")


def check_recipe(
    name: str, root: Path, base_and_rows: tuple[Path, Mapping[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_one_device(monkeypatch)
    run = make_short_run(name, root, *base_and_rows)
    summary = train(run)
    losses = read_losses(root / name)
    assert summary["step"] == len(run.stages) and summary["step"] >= len(losses)
    assert losses and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", SAMPLE)
def test_recipe_trains(
    name: str, tmp_path: Path, base_and_rows: tuple[Path, Mapping[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_recipe(name, tmp_path, base_and_rows, monkeypatch)


@pytest.mark.all_recipes
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLE])
def test_other_recipe_trains(
    name: str, tmp_path: Path, base_and_rows: tuple[Path, Mapping[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_recipe(name, tmp_path, base_and_rows, monkeypatch)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_recipe_compiles_for_a_tpu_slice(tmp_path: Path, base_and_rows: tuple[Path, Mapping[str, Path]]) -> None:
    """benchmarks/recipe_plans.py compiles recipes at their real sizes."""
    config_file = tmp_path / "run.yaml"
    config_file.write_text(make_short_run("llm2vec_simcse", tmp_path, *base_and_rows).dump())
    done = run_command("jaxembed.train", str(config_file), "--topology", "v5e:2x2", "--code", env=TPU_COMPILER_ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["mesh"]["fsdp"] == 4 and result["device"] == "TPU v5 lite"
    assert 0 < result["stages"][0]["memory"]["code"] < result["stages"][0]["memory"]["all"] < 16 << 30
