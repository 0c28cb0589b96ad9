"""benchmarks/ablations.py on a tiny base and generated data, and the rows of similar scripts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.recipes import write_base, write_rows
from helpers.runs import use_one_device
from jaxembed.config.shipped import find_shipped_folder


@pytest.fixture(scope="module")
def ablations() -> Iterator[Any]:
    """The script. It silences a logger, which speaks again afterwards."""
    level = logging.getLogger("jaxembed").level
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(find_shipped_folder().parent / "benchmarks"))
        yield importlib.import_module("ablations")
    logging.getLogger("jaxembed").setLevel(level)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Base, data, miner and results."""
    root = tmp_path_factory.mktemp("ablations")
    base, rows, data = write_base(root / "base"), write_rows(root / "rows"), root / "data"
    copies = {"ag_news/pairs_train.jsonl": "pairs"}
    copies |= {f"{folder}/{split}.jsonl": kind for folder, kind in (("banking77", "labels"), ("stsb/en", "scored_pairs"))
               for split in ("train", "test")}  # fmt: skip
    for path, kind in copies.items():
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(rows[kind], data / path)
    shutil.copytree(rows["beir"], data / "ag_news" / "retrieval")
    return [str(base), str(data), str(base), str(root / "results.jsonl")]


def make_settings(ablations: Any, arguments: list[str], **changes: Any) -> Any:
    """Return settings with the folders of `arguments`."""
    base, data, miner, _ = arguments
    shared = {"steps": 1, "batch_size": 4, "learning_rate": 1e-4, "negatives": 3, "max_length": 128, "dtype": "float32"}
    return ablations.Settings(base, Path(data), miner, **shared | changes)


def test_runs_are_kept_and_compared_with_the_paper(
    ablations: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the two rows is there already. The other one is trained."""
    use_one_device(monkeypatch)
    settings, results = make_settings(ablations, arguments), arguments[-1]
    scores = dict.fromkeys((*ablations.SCORES, "mean"), 0.5)
    known = {
        "ablation": "labels",
        "row": "labels",
        "seed": 0,
        "scores": scores,
        "minutes": 1.0,
        "settings": dataclasses.asdict(settings) | {"data": str(settings.data)},
    }
    Path(results).write_text(json.dumps(known) + "\n")
    options = ["--only", "labels", "--steps", "1", "--batch-size", "4", "--seeds", "1"]
    ablations.main([*arguments, *options])
    first, second = (json.loads(line) for line in Path(results).read_text().splitlines())
    assert first == known and (second["row"], second["seed"]) == ("examples", 0)
    assert second["scores"].keys() == scores.keys() and all(0 <= abs(score) <= 1 for score in second["scores"].values())
    report = capsys.readouterr().out
    difference = f"{second['scores']['classification'] - 0.5:+.4f}"
    assert (
        f"| examples | labels | classification | NV-Embed, Table 5, average: 69.27 and 64.80 | {difference} | one seed |"
        in report
    )
    # The same settings again: every run is there. With others, none is.
    monkeypatch.setattr(ablations, "train", None)
    ablations.main([*arguments, *options])
    assert capsys.readouterr().out == report
    ablations.main([*arguments, *options[:2], "--report"])
    assert capsys.readouterr().out == ""


def test_every_row_is_a_valid_config(ablations: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(ablations, "train", trained.append)
    settings = make_settings(ablations, arguments, steps=4, batch_size=2)
    listed = ablations.list_ablations(settings)
    for ablation in listed.values():
        for changes in ablation.rows.values():
            ablations.train_row(settings, changes, 0, settings.data / "run")
        assert {row for claim in ablation.claims for row in (claim.higher, claim.lower)} <= set(ablation.rows)
    assert len(trained) == sum(len(ablation.rows) for ablation in listed.values())
    assert len({run.dump() for run in trained}) == len(trained) - 4  # five ablations have a row of the same config


def test_rows_with_the_same_config_share_their_runs(ablations: Any, arguments: list[str]) -> None:
    shared = ablations.find_trained_rows(make_settings(ablations, arguments, steps=30))
    first = ablations.RowKey("pooling", "mean, bidirectional")
    assert {key for key, trained in shared.items() if trained == first} == {
        first, ("negatives", "mined (95% of the positive)"), ("instructions", "with"), ("batches", "batch x 1, epochs: 1"),
    }  # fmt: skip
    assert all(trained == key for key, trained in shared.items() if trained != first)
    assert shared["widths", "plain"] == ("widths", "plain")  # trained for itself, because it has more scores


def test_every_row_of_the_objectives_is_a_valid_config(
    ablations: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of benchmarks/graded.py and benchmarks/adaptation.py."""
    graded, adaptation = map(importlib.import_module, ("graded", "adaptation"))
    base, data, miner, _ = arguments
    shared = {"base": base, "steps": 10, "batch_size": 2, "learning_rate": 1e-4}
    args = Namespace(
        **shared, stsb=Path(data) / "stsb", adaptation_steps=5, teacher=miner, max_length=32, dtype="bfloat16", versions=True
    )
    rows = graded.list_rows([1], Path("ranges.npy"))
    assert len({graded.make_config(base, changes, 0, Path("run"), args).dump() for changes in rows.values()}) == len(rows)
    trained: list[Any] = []
    monkeypatch.setattr(adaptation, "train", trained.append)
    paths = {name: str(Path(data) / "ag_news" / "pairs_train.jsonl") for name in ("pairs", "texts", "chats", "ranges")}
    for row in adaptation.list_rows(paths, [1], args).values():
        adaptation.train_row(row, 0, Path("run"), args)
    assert len({run.dump() for run in trained}) == 13


def test_effects_within_the_spread_have_no_direction(ablations: Any) -> None:
    claim = ablations.Claim("a", "b", "mean", "")
    assert ablations.judge_claim(claim, {"a": [2.0, 2.2], "b": [1.0, 1.2]})[1] == "the paper's"
    assert ablations.judge_claim(claim, {"a": [1.0, 1.2], "b": [2.0, 2.2]})[1] == "the opposite"
    assert ablations.judge_claim(claim, {"a": [1.0, 3.0], "b": [0.9, 3.0]})[1] == "none"
