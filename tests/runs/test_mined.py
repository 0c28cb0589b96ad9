"""Stages that mine: similar pairs and documents are mined too, and the consistency filter changes the plan of the stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.runs import copy_run_at_first_checkpoint, make_config, read_losses, write_base_and_data
from helpers.sources import SCORED_ROWS, open_source_file, write_jsonl
from jaxembed import Embedder
from jaxembed.config import Config, MineConfig
from jaxembed.curation.remining import check_mined_sources
from jaxembed.data.batch import EncoderInput
from jaxembed.data.containers import open_container
from jaxembed.data.equality import normalize_text
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sampling import EXAMPLE_FIELD, MINED_SCHEMA, MinedPairSampler
from jaxembed.errors import UserError
from jaxembed.hub.frozen_encoder import open_frozen_encoder
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

TOP_K, FIRST_RANK, LAST_RANK = 12, 6, 20
MINE = {"rule": "window", "window": [FIRST_RANK, LAST_RANK], "negatives": 2, "consistency_top_k": TOP_K}
INSTRUCTION = "Find it"


def make_mining_config(root: Path, run: str, *overrides: str) -> Config:
    """Return a config that mines pairs and similar pairs before its only stage. Shares go by size."""
    similar = {"path": str(root / "sts.jsonl"), "name": "similar", "min_score": 1, "symmetric": True}
    similar |= {"instructions": [INSTRUCTION]}
    pairs = {"path": str(root / "pairs.jsonl"), "instructions": [INSTRUCTION]}
    keys = {"data.sources": [pairs, similar], "mine": MINE, "data.mixture": {"by": "size"}, "eval.sets": [], "mesh.data": 1}
    settings = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return make_config(root, run, *settings, "data.max_length=64", "train.steps=5", "train.checkpoint_every=3", *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and one finished run, `straight`."""
    root = write_base_and_data(tmp_path_factory.mktemp("mined"))
    train(make_mining_config(root, "straight"))
    return root


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_mined(folder: Path, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the mined pairs of a source, and the report about them."""
    path = folder / "straight" / "mined" / f"stage-0-source-{number}.jsonl"
    return read_rows(path), json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("number", [0, 1], ids=["pairs", "similar"])
def test_the_nearest_texts_decide_about_positives_and_negatives(folder: Path, number: int) -> None:
    """They are found again with the base model, by every score there is."""
    if number == 0:
        pairs = [(i, row["query"], row["pos"][0]) for i, row in enumerate(read_rows(folder / "pairs.jsonl"))]
        texts = [text for row in read_rows(folder / "pairs.jsonl") for text in (*row["pos"], *row["neg"])]
    else:
        rows = [row for row in read_rows(folder / "sts.jsonl") if row["score"] >= 1]
        sides = [(row["sentence1"], row["sentence2"]) for row in rows]
        pairs = [(i, *direction) for i, side in enumerate(sides) for direction in (side, side[::-1])]
        texts = [pair[2] for pair in pairs]
    texts = list({normalize_text(text): text for text in texts}.values())
    model = Embedder.load(folder / "base")
    vectors = model.encode(texts, INSTRUCTION if number else None)
    scores = model.encode([query for _, query, _ in pairs], INSTRUCTION) @ vectors.T
    mined, report = read_mined(folder, number)
    by_pair = {(row[EXAMPLE_FIELD], row["query"]): row for row in mined}
    for (example, query, positive), row_scores in zip(pairs, scores, strict=True):
        known = {other for _, same, other in pairs if same == query} | {query}
        order = [i for i in np.argsort(-row_scores) if texts[i] not in known]
        num_above = int((row_scores[order] > row_scores[texts.index(positive)]).sum())
        row = by_pair.get((example, query))
        assert (row is not None) == (num_above < TOP_K)
        if row is not None:
            assert row["pos"] == [positive] and len(row["neg"]) == 2
            assert {texts.index(text) for text in row["neg"]} <= set(order[FIRST_RANK - 1 : LAST_RANK])
    assert 16 < len(mined) == report["written"] < report["rows"] == len(pairs)
    assert report["dropped"]["inconsistent"] == len(pairs) - len(mined)


def test_another_model_finds_the_negatives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own prompts and weights count. It is a BERT of another width."""
    monkeypatch.setenv("JAXEMBED_CACHE", str(folder / "cache"))
    miner = tiny.write_bert_folder(folder / "bert", {"query": "ask "})
    mine = json.dumps({"rule": "top_k", "negatives": 1, "model": str(miner), "sources": ["pairs"]})
    train(make_mining_config(folder, "taught", f"mine={mine}", "train.steps=1", "data.sources.0.instructions=[]"))
    mined = folder / "taught" / "mined" / "stage-0-source-0.jsonl"
    assert not mined.with_name("stage-0-source-1.jsonl").exists()  # mine.sources leaves the other source as it is
    rows, pairs = read_rows(mined), read_rows(folder / "pairs.jsonl")
    texts = list(dict.fromkeys(text for pair in pairs for text in (*pair["pos"], *pair["neg"])))
    encoder = open_frozen_encoder(str(miner), folder / "cache")
    scores = encoder.encode([EncoderInput(row["query"], "query", "") for row in rows]) @ encoder.encode(
        [EncoderInput(text, "document", "") for text in texts]
    ).T  # fmt: skip
    for row, row_scores in zip(rows, scores, strict=True):
        known = {text for pair in pairs if pair["query"] == row["query"] for text in pair["pos"]} | {row["query"]}
        best = max(score for text, score in zip(texts, row_scores, strict=True) if text not in known)
        assert row_scores[texts.index(row["neg"][0])] == pytest.approx(best, abs=1e-5)
    assert json.loads(mined.with_suffix(".json").read_text())["model"] == encoder.identity
    with pytest.raises(UserError, match=r"\./absent"):
        train(make_mining_config(folder, "absent", "mine.model=./absent"))
    assert not (folder / "absent").exists()


def test_a_run_resumes_bit_for_bit_from_the_rows_that_are_left(folder: Path) -> None:
    config = make_mining_config(folder, "resumed")
    assert copy_run_at_first_checkpoint(folder / "straight", config) == 3
    mined = folder / "resumed" / "mined"
    with pytest.raises(UserError, match=r"stage-0-source-0\.jsonl: is missing, but the run has trained on it\. Restore it"):
        train(config)
    shutil.copytree(folder / "straight" / "mined", mined, dirs_exist_ok=True)
    content = (mined / "stage-0-source-1.jsonl").read_text()
    (mined / "stage-0-source-1.jsonl").write_text(content.replace("neg", "pos_", 1))
    with pytest.raises(UserError, match=r"stage-0-source-1\.jsonl: changed since it was mined\. Restore it"):
        train(config)
    (mined / "stage-0-source-1.jsonl").write_text(content)
    train(config)
    assert read_losses(folder / "resumed") == read_losses(folder / "straight") and len(read_losses(folder / "resumed")) == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mine.consistency_top_k=1", r"^mine\.consistency_top_k: no positive is among the 1 nearest documents of its query"),
        (
            "train.batch_size=100",
            r"^train\.batch_size: 100 is more than the .* \(\d+\)\. .* mine\.consistency_top_k has dropped",
        ),
        ("mine.sources=[pair]", r"^mine\.sources contains 'pair' \(expected names of sources: pairs, similar\)"),
    ],
)
def test_mining_that_does_not_fit_the_data_is_refused(folder: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(make_mining_config(folder, override.partition("=")[0], override))


def test_rows_of_one_example_are_drawn_as_one(tmp_path: Path) -> None:
    source = open_source_file(write_jsonl(tmp_path / "a.jsonl", SCORED_ROWS), min_score=3)
    rows = [{EXAMPLE_FIELD: i, **row} for i, row in source.iter_numbered_pairs()]
    assert [row[EXAMPLE_FIELD] for row in rows] == [0, 0, 1, 1, 2, 2]

    def open_mined(kept_rows: list[dict[str, Any]]) -> MinedPairSampler:
        path = write_jsonl(tmp_path / "mined.jsonl", kept_rows)
        return MinedPairSampler(IndexedRows(open_container(str(path)), MINED_SCHEMA), 1)

    mined = open_mined([rows[0], rows[1], rows[3]])  # one example lost a direction, another one both
    assert len(mined) == 2 and [len([*mined.iter_pairs(i, 0, None)]) for i in range(2)] == [2, 1]
    drawn = [{mined.draw(i, np.random.default_rng(seed), 1).query for seed in range(20)} for i in range(2)]
    assert drawn == [{"a3", "b3"}, {"b4"}]
    earlier = open_mined([{key: value for key, value in row.items() if key != EXAMPLE_FIELD} for row in rows])
    assert len(earlier) == 6  # files of earlier versions number no examples: every row is one


def test_documents_are_mined_and_labels_are_not(tmp_path: Path) -> None:
    templates = [{"query": "{title}", "positive": "{body}"}]
    documents = open_source_file(write_jsonl(tmp_path / "d.jsonl", [{"title": "a", "body": "b"}]), pair_templates=templates)
    labels = open_source_file(write_jsonl(tmp_path / "l.jsonl", [{"text": str(i), "label": i % 2} for i in range(4)]))
    texts = open_source_file(write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}]))
    assert (documents.is_mineable, labels.is_mineable, texts.is_mineable) == (True, False, False)
    with pytest.raises(UserError, match=r"^stages\.1\.mine\.sources contains 'l', but rows of format labels are not mined"):
        check_mined_sources([labels], MineConfig(sources=("l",)), 0, "stages.1.")
