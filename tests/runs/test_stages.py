"""Runs of several stages: what each stage changes and passes on, and resuming in any of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers import runs, tiny
from helpers.runs import make_config, read_losses, write_base_and_data
from jaxembed import Embedder, config
from jaxembed.data.sources import open_sources
from jaxembed.errors import UserError
from jaxembed.hub.frozen_encoder import open_frozen_encoder
from jaxembed.runs import encoders
from jaxembed.runs.train import train
from jaxembed.training import loop
from jaxembed.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")

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
    root = write_base_and_data(tmp_path_factory.mktemp("stages"))
    rows = [{"text": f"{'abc'[i % 3] * 3} {i}", "label": i % 3} for i in range(30)]
    (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, Any]:
    """Return what a run of these stages returned. Its folder is `uninterrupted`."""
    return train(make_staged_config(folder, "uninterrupted", STAGES))


def make_staged_config(root: Path, run: str, stages: list[dict[str, Any]], *overrides: str) -> config.Config:
    """Return a config with these stages and no held-out set. All but the first stage train on labels too."""
    pairs = yaml.safe_load(make_config(root, run, *overrides).dump())["data"]["sources"]
    both = [*pairs, {"path": str(root / "labels.jsonl"), "instructions": ["Sort it"]}]
    later = [{"data": {"sources": both}, **stage} for stage in stages[1:]]
    return runs.make_staged_config(root, run, [stages[0], *later], "eval.sets=[]", "model.unroll=false", *overrides)


def read_metric(root: Path, run: str, key: str) -> list[float]:
    return [row[key] for row in read_metrics(root / run) if key in row]


def test_each_stage_applies_its_changes(folder: Path, uninterrupted: dict[str, Any]) -> None:
    assert uninterrupted["step"] == 9
    assert read_metric(folder, "uninterrupted", "stage") == [0] * 5 + [1] * 4
    assert read_metric(folder, "uninterrupted", "step") == list(range(1, 10))
    assert np.allclose(
        read_metric(folder, "uninterrupted", "learning_rate")[:6], [5e-4, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3, 5e-4], atol=1e-9
    )
    assert (
        read_metric(folder, "uninterrupted", "infonce_negatives")[0] > 20
        and max(read_metric(folder, "uninterrupted", "infonce_negatives")[5:]) <= 1
    )
    assert (
        len(read_metric(folder, "uninterrupted", "infonce_16")) == len(read_metric(folder, "uninterrupted", "infonce_2")) == 4
    )
    temperatures = read_metric(folder, "uninterrupted", "infonce_temperature")
    assert temperatures[0] == pytest.approx(0.1) and len(set(temperatures)) == 9
    assert abs(temperatures[5] - temperatures[4]) < 1e-3  # not 0.05, the initial value of the second stage
    assert {"pairs", "labels"} <= set(json.loads((folder / "uninterrupted" / "jaxembed.json").read_text())["prompts"])
    recorded = config.load_config(folder / "uninterrupted" / "config.yaml")  # can be read again
    assert [stage.train.steps for stage in recorded.stages] == [5, 4]


@pytest.mark.usefixtures("uninterrupted")
@pytest.mark.parametrize("last", [5, 8])
def test_a_run_killed_in_any_stage_resumes_bit_for_bit(folder: Path, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the checkpoint at the end of the first stage, or after one in the second."""

    class Killed(Exception):
        pass

    def log(self: Any, step: int, values: Any, stage: int = 0) -> None:
        if step == last + 1:
            raise Killed
        real(self, step, values, stage)

    real = loop.Recorder.log
    with monkeypatch.context() as patch:
        patch.setattr(loop.Recorder, "log", log)
        with pytest.raises(Killed):
            train(make_staged_config(folder, f"dies{last}", STAGES))
    mined = folder / f"dies{last}" / "mined"
    before = {path: path.stat().st_mtime_ns for path in mined.iterdir()}
    assert sorted(path.name for path in before) == ["stage-1-source-0.json", "stage-1-source-0.jsonl"]  # labels have their own
    if last == 5:
        check_nearest(folder, mined / "stage-1-source-0.jsonl")
    train(make_staged_config(folder, f"dies{last}", STAGES))
    assert read_losses(folder / f"dies{last}") == read_losses(folder / "uninterrupted")
    assert {path: path.stat().st_mtime_ns for path in mined.iterdir()} == before


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def list_pairs(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return queries and their positives."""
    return [(row["query"], row["pos"]) for row in rows]


def check_nearest(folder: Path, mined: Path) -> None:
    """Check that the negatives are the nearest texts under the model at the end of the first stage, without positives."""
    rows, pairs = read_rows(mined), read_rows(folder / "pairs.jsonl")
    assert list_pairs(rows) == list_pairs(pairs)
    model = Embedder.load(folder / "dies5", checkpoint="5")
    texts = list(dict.fromkeys(text for pair in pairs for text in (*pair["pos"], *pair["neg"])))
    near = model.encode([pair["query"] for pair in pairs], "Find it") @ model.encode(texts).T
    for pair, row, scores in zip(pairs, rows, near, strict=True):
        known = {text for other in pairs if other["query"] == pair["query"] for text in other["pos"]} | {pair["query"]}
        nearest = [texts[i] for i in np.argsort(-scores) if texts[i] not in known][:3]
        found = [scores[texts.index(text)] for text in row["neg"]]
        assert not known & set(row["neg"]) and len(row["neg"]) == 3
        assert found == pytest.approx([scores[texts.index(text)] for text in nearest], abs=1e-5)


def test_a_stage_mines_only_for_the_examples_in_use(folder: Path) -> None:
    second = {"train": {"steps": 2, "batch_size": 8}, "mine": {"rule": "top_k", "negatives": 3}}
    configured = make_staged_config(folder, "capped", [{"train": {"steps": 1}}, second], "data.sources.0.max_examples=24")
    train(configured)
    mined = list_pairs(read_rows(folder / "capped" / "mined" / "stage-1-source-0.jsonl"))
    used = list_pairs(open_sources(configured.data, folder)[0].iter_pairs())
    assert mined == used and len(mined) == 24 and mined != list_pairs(read_rows(folder / "pairs.jsonl"))[:24]
    assert read_metric(folder, "capped", "step") == [1, 2, 3]


def test_guide_and_teacher_of_other_architectures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide is a decoder, the teacher a BERT of another width, both in the second stage only. Vectors are cached."""
    monkeypatch.setenv("JAXEMBED_CACHE", str(folder / "cache"))
    teacher = tiny.write_bert_folder(folder / "bert", {"query": "ask "})
    second = [
        {"name": "infonce", "guide": str(folder / "base"), "guide_margin": 2.0},  # excludes every negative
        {"name": "embedding_matching", "teacher": str(teacher)},
    ]
    train(make_staged_config(folder, "guided", [{"train": {"steps": 2}}, {"train": {"steps": 2}, "objectives": second}]))
    matched, met = (read_metric(folder, "guided", key) for key in ("embedding_matching", "infonce_negatives"))
    assert len(matched) == 2 and all(value > 0 for value in matched)
    assert min(met[:2]) > 20 and met[2:] == [0, 0]
    assert json.loads((folder / "guided" / "teacher.json").read_text())["name"] == str(teacher)
    assert len(list((folder / "cache" / "vectors").iterdir())) == 2


def test_a_model_that_is_guide_and_teacher_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXEMBED_CACHE", str(folder / "cache"))
    opened: list[str] = []
    monkeypatch.setattr(
        encoders, "open_frozen_encoder", lambda name, *rest, **kw: opened.append(name) or open_frozen_encoder(name, *rest, **kw)
    )
    base = str(folder / "base")
    both = [{"name": "infonce", "guide": base}, {"name": "embedding_matching", "teacher": base}]
    train(make_staged_config(folder, "both", [{"train": {"steps": 2}, "objectives": both}]))
    assert opened == [base]
    records = [json.loads((folder / "both" / f"{role}.json").read_text()) for role in ("guide", "teacher")]
    assert records[0] == records[1] and records[0]["name"] == base
    assert len(read_metric(folder, "both", "embedding_matching")) == 2


def test_one_stage_is_a_run_without_stages(folder: Path) -> None:
    train(make_staged_config(folder, "one", [{"train": {"steps": 3}}]))
    train(make_config(folder, "none", "train.steps=3", "eval.sets=[]", "model.unroll=false"))
    assert read_losses(folder / "one") == read_losses(folder / "none")


def test_a_stage_may_continue_the_optimizer(folder: Path) -> None:
    train(make_staged_config(folder, "joined", [{"train": {"steps": 2}}, {"train": {"steps": 4}, "optim": {"restart": False}}]))
    rates = read_metric(folder, "joined", "learning_rate")
    assert np.allclose(rates, [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4], atol=1e-9)
    second = STAGES[0] | {"optim": {"restart": False}}
    with pytest.raises(UserError, match=r"stages\.1: optim\.restart is false, but the objectives train other parameters"):
        train(make_staged_config(folder, "other", [{"train": {"steps": 1}}, second]))
    assert not (folder / "other" / "metrics.jsonl").exists(), "refused before the first stage is trained"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"train": {"batch_size": 8}}], r"stages\.0\.train\.steps is missing\. Set it: every stage has its own"),
        ([{"train": {"steps": 1}}, {"train": {"steps": 1}, "model": {}}], r"stages\.1\.model: all stages share this key"),
        ([{"train": {"steps": 1, "seed": 3}}], r"stages\.0\.train\.seed: all stages share this key\. Set it outside of stages"),
        ([{"train": {"steps": 1}, "optm": {}}], r"unknown key stages\.0\.optm\. Did you mean stages\.0\.optim\?"),
        ([{"train": {"steps": 0}}], r"stages\.0\.train\.steps is .* \(expected"),
        (
            [{"train": {"steps": 1}, "objectives": [{"name": "nce"}]}],
            r"objectives\.0\.name is 'nce' \(expected infonce or ",
        ),
        ([3], r"stages\.0 is 3 \(expected a mapping"),
    ],
)
def test_invalid_stages_are_refused(folder: Path, stages: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_staged_config(folder, "refused", stages)


def test_a_window_beyond_all_texts_is_refused_before_anything_is_written(folder: Path) -> None:
    mine = {"rule": "window", "window": [500, 600]}
    message = r"stages\.1\.mine\.window: negatives start at rank 500, but source pairs has only 192 texts"
    with pytest.raises(UserError, match=message):
        train(make_staged_config(folder, "beyond", [STAGES[0], {**STAGES[1], "mine": mine}]))
    assert not (folder / "beyond").exists()


def test_steps_beside_stages_are_refused(folder: Path) -> None:
    path = folder / "both.yaml"
    tree = yaml.safe_load(make_config(folder, "both").dump())
    path.write_text(yaml.safe_dump(tree | {"stages": [{"train": {"steps": 1}}]}))
    with pytest.raises(UserError, match=r"both\.yaml: train\.steps and stages exclude each other\. Give each stage its own"):
        config.load_config(path)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "kl_distillation"}, "nothing to train on: pairs has no pos_scores and neg_scores, which all its"),
        ({"name": "infonce", "sources": ["labels"]}, r"^stages\.0\.objectives\.0\.sources contains 'labels' \(.*: pairs\)\.$"),
    ],
)  # fmt: skip
def test_objectives_without_data_are_refused(folder: Path, objective: dict[str, Any], message: str) -> None:
    stage = {"train": {"steps": 1}, "objectives": [objective]}
    with pytest.raises(UserError, match=message):
        train(make_staged_config(folder, f"nothing_{objective['name']}", [stage, {"train": {"steps": 1}}]))
