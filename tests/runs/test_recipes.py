"""Recipes train end to end on a tiny base and generated rows: every stage, with only base, paths, steps and batch replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

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
