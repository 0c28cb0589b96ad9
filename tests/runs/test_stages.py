"""Runs of several stages: what each changes, what goes from one to the next, and the way on after a kill in any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers import runs
from helpers import tiny
from jaxembed import Embedder, config
from jaxembed.data.sources import open_sources
from jaxembed.errors import UserError
from jaxembed.hub.frozen_encoder import open_frozen_encoder
from jaxembed.runs import train as run
from jaxembed.runs.train import train
from jaxembed.training import loop
from jaxembed.training.metrics import read_metrics
from helpers.runs import losses, prepare, settings

STAGES = [
    {"train": {"steps": 5}, "objectives": [{"name": "infonce", "temperature": 0.1, "learn_temperature": True}]},
    {
        "train": {"steps": 4, "batch_size": 8},
        "optim": {"learning_rate": 5e-4, "warmup_steps": 0},
        "objectives": [
            {"name": "infonce", "negatives": "hard", "learn_temperature": True},
            {"name": "infonce", "sources": ["labels"], "weight": 0.5},
        ],
        "matryoshka": {"dims": [16], "weights": [0.3]},
        "gradcache": {"rows": 2},
        "mine": {"rule": "top_k", "negatives": 3},
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = prepare(tmp_path_factory.mktemp("stages"))
    rows = [{"text": f"{'abc'[i % 3] * 3} {i}", "label": i % 3} for i in range(30)]
    (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def staged(root: Path, run: str, stages: list[dict[str, Any]], *overrides: str) -> config.Config:
    """The config of `runs.settings`, without a held-out set, in stages; the second trains on labels too."""
    pairs = yaml.safe_load(settings(root, run, *overrides).dump())["data"]["sources"]
    both = [*pairs, {"path": str(root / "labels.jsonl"), "instructions": ["Sort it"]}]
    later = [{"data": {"sources": both}, **stage} for stage in stages[1:]]
    return runs.staged(root, run, [stages[0], *later], "eval.sets=[]", "model.unroll=false", *overrides)


def logged(root: Path, run: str, key: str) -> list[float]:
    return [row[key] for row in read_metrics(root / run) if key in row]


def test_each_stage_trains_as_its_changes_say(folder: Path) -> None:
    summary = train(staged(folder, "two", STAGES))
    assert summary["step"] == 9
    assert logged(folder, "two", "stage") == [0] * 5 + [1] * 4
    assert logged(folder, "two", "step") == list(range(1, 10))
    assert np.allclose(logged(folder, "two", "learning_rate")[:6], [5e-4, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3, 5e-4], atol=1e-9)
    assert logged(folder, "two", "infonce_negatives")[0] > 20 and max(logged(folder, "two", "infonce_negatives")[5:]) <= 1
    assert len(logged(folder, "two", "infonce_16")) == len(logged(folder, "two", "infonce_2")) == 4
    temperatures = logged(folder, "two", "infonce_temperature")
    assert temperatures[0] == pytest.approx(0.1) and len(set(temperatures)) == 9
    assert abs(temperatures[5] - temperatures[4]) < 1e-3  # not the 0.05 that the second stage would begin with
    assert {"pairs", "labels"} <= set(json.loads((folder / "two" / "jaxembed.json").read_text())["prompts"])
    recorded = config.load_config(folder / "two" / "config.yaml")  # can be read again
    assert [stage.train.steps for stage in recorded.in_stages()] == [5, 4]


@pytest.mark.parametrize("last", [5, 8])
def test_a_run_that_dies_in_any_stage_goes_on_bit_for_bit(folder: Path, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the checkpoint at the end of the first stage, and after one in the second."""
    if not (folder / "straight").exists():
        train(staged(folder, "straight", STAGES))

    class Dead(Exception):
        pass

    def log(self: Any, step: int, values: Any, stage: int = 0) -> None:
        if step == last + 1:
            raise Dead
        real(self, step, values, stage)

    real = loop.Recorder.log
    with monkeypatch.context() as patch:
        patch.setattr(loop.Recorder, "log", log)
        with pytest.raises(Dead):
            train(staged(folder, f"dies{last}", STAGES))
    mined = folder / f"dies{last}" / "mined"
    before = {path: path.stat().st_mtime_ns for path in mined.iterdir()}
    assert [path.name for path in before] == ["stage-1-source-0.jsonl"]  # labels have negatives of their own
    if last == 5:
        check_nearest(folder, mined / "stage-1-source-0.jsonl")
    train(staged(folder, f"dies{last}", STAGES))
    assert losses(folder / f"dies{last}") == losses(folder / "straight")
    assert {path: path.stat().st_mtime_ns for path in mined.iterdir()} == before


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Queries and their positives."""
    return [(row["query"], row["pos"]) for row in rows]


def check_nearest(folder: Path, mined: Path) -> None:
    """The negatives are the texts that the model at the end of the first stage finds nearest, but for positives."""
    rows, pairs = rows_of(mined), rows_of(folder / "pairs.jsonl")
    assert asked(rows) == asked(pairs)
    model = Embedder.load(folder / "dies5", checkpoint="5")
    texts = list(dict.fromkeys(text for pair in pairs for text in (*pair["pos"], *pair["neg"])))
    near = model.encode([pair["query"] for pair in pairs], "Find it") @ model.encode(texts).T
    for pair, row, scores in zip(pairs, rows, near, strict=True):
        known = {text for other in pairs if other["query"] == pair["query"] for text in other["pos"]} | {pair["query"]}
        nearest = [texts[i] for i in np.argsort(-scores) if texts[i] not in known][:3]
        found = [scores[texts.index(text)] for text in row["neg"]]
        assert not known & set(row["neg"]) and len(row["neg"]) == 3
        assert found == pytest.approx([scores[texts.index(text)] for text in nearest], abs=1e-5)


def test_a_stage_mines_for_the_examples_that_its_source_uses(folder: Path) -> None:
    second = {"train": {"steps": 2, "batch_size": 8}, "mine": {"rule": "top_k", "negatives": 3}}
    configured = staged(folder, "capped", [{"train": {"steps": 1}}, second], "data.sources.0.max_examples=24")
    train(configured)
    mined = asked(rows_of(folder / "capped" / "mined" / "stage-1-source-0.jsonl"))
    used = asked(open_sources(configured.data, folder)[0].iter_pairs())
    assert mined == used and len(mined) == 24 and mined != asked(rows_of(folder / "pairs.jsonl"))[:24]
    assert logged(folder, "capped", "step") == [1, 2, 3]


def test_a_guide_and_a_teacher_of_other_kinds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide is another decoder, the teacher a BERT of another width, in the second stage alone; vectors are kept."""
    monkeypatch.setenv("JAXEMBED_CACHE", str(folder / "cache"))
    teacher = tiny.bert_folder(folder / "bert", {"query": "ask "})
    second = [
        {"name": "infonce", "guide": str(folder / "base"), "guide_margin": 2.0},  # so that it finds no text far enough
        {"name": "embedding_matching", "teacher": str(teacher)},
    ]
    train(staged(folder, "guided", [{"train": {"steps": 2}}, {"train": {"steps": 2}, "objectives": second}]))
    matched, met = (logged(folder, "guided", key) for key in ("embedding_matching", "infonce_negatives"))
    assert len(matched) == 2 and all(value > 0 for value in matched)
    assert min(met[:2]) > 20 and met[2:] == [0, 0]
    assert json.loads((folder / "guided" / "teacher.json").read_text())["name"] == str(teacher)
    assert len(list((folder / "cache" / "vectors").iterdir())) == 2


def test_a_guide_that_is_the_teacher_too_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(folder / "cache"))
    opened: list[str] = []
    monkeypatch.setattr(run, "open_encoder", lambda name, cache: opened.append(name) or open_frozen_encoder(name, cache))
    base = str(folder / "base")
    both = [{"name": "infonce", "guide": base}, {"name": "embedding_matching", "teacher": base}]
    train(staged(folder, "both", [{"train": {"steps": 2}, "objectives": both}]))
    assert opened == [base]
    records = [json.loads((folder / "both" / f"{role}.json").read_text()) for role in ("guide", "teacher")]
    assert records[0] == records[1] and records[0]["name"] == base
    assert len(logged(folder, "both", "embedding_matching")) == 2


def test_one_stage_is_a_run_without_stages(folder: Path) -> None:
    train(staged(folder, "one", [{"train": {"steps": 3}}]))
    train(settings(folder, "none", "train.steps=3", "eval.sets=[]", "model.unroll=false"))
    assert losses(folder / "one") == losses(folder / "none")


def test_a_stage_may_go_on_with_the_optimizer_before(folder: Path) -> None:
    train(staged(folder, "joined", [{"train": {"steps": 2}}, {"train": {"steps": 4}, "optim": {"restart": False}}]))
    rates = logged(folder, "joined", "learning_rate")
    assert np.allclose(rates, [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4], atol=1e-9)
    second = STAGES[0] | {"optim": {"restart": False}}
    with pytest.raises(UserError, match=r"stages\.1: optim\.restart is no, but its objectives train other parameters"):
        train(staged(folder, "other", [{"train": {"steps": 1}}, second]))


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([{"train": {"batch_size": 8}}], r"stages\.0\.train\.steps is missing; every stage names its own"),
        ([{"train": {"steps": 1}}, {"train": {"steps": 1}, "model": {}}], r"stages\.1\.model: is one for all stages"),
        ([{"train": {"steps": 1, "seed": 3}}], r"stages\.0\.train\.seed: is one for all stages; set it outside of stages"),
        ([{"train": {"steps": 1}, "optm": {}}], r"stages\.0: unknown key optm; did you mean optim\?"),
        ([{"train": {"steps": 0}}], r"stages\.0: train\.steps: expected"),
        (
            [{"train": {"steps": 1}, "objectives": [{"name": "nce"}]}],
            r"objectives\.0\.name: expected infonce or .*'nce'",
        ),
        ([3], r"stages\.0: expected a mapping"),
    ],
)
def test_what_a_stage_cannot_be(folder: Path, stages: list[Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        staged(folder, "refused", stages)


def test_a_window_beyond_all_texts_is_refused_before_anything_is_written(folder: Path) -> None:
    mine = {"rule": "window", "window": [500, 600]}
    told = r"stages\.1\.mine\.window takes negatives from rank 500 on, and source pairs has 192 texts, at least one"
    with pytest.raises(UserError, match=told):
        train(staged(folder, "beyond", [STAGES[0], {**STAGES[1], "mine": mine}]))
    assert not (folder / "beyond").exists()


def test_steps_beside_stages_are_refused(folder: Path) -> None:
    path = folder / "both.yaml"
    tree = yaml.safe_load(settings(folder, "both").dump())
    path.write_text(yaml.safe_dump(tree | {"stages": [{"train": {"steps": 1}}]}))
    with pytest.raises(UserError, match=r"both\.yaml: train\.steps and stages do not go together; give each stage its own"):
        config.load_config(path)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"name": "kl_distillation"}, "nothing to train on: pairs has no pos_scores and neg_scores, which all its"),
        ({"name": "infonce", "sources": ["labels"]}, r"^stages\.0\.objectives\.0\.sources names 'labels'; expected .*: pairs$"),
    ],
)  # fmt: skip
def test_objectives_that_find_nothing_are_refused(folder: Path, objective: dict[str, Any], told: str) -> None:
    stage = {"train": {"steps": 1}, "objectives": [objective]}
    with pytest.raises(UserError, match=told):
        train(staged(folder, f"nothing_{objective['name']}", [stage, {"train": {"steps": 1}}]))
