"""Runs with objectives that predict tokens: stages, resume, the language-model head, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.runs import copy_run_at_first_checkpoint, make_config, make_staged_config, read_losses, write_base_and_data
from jaxembed import Embedder
from jaxembed.config import Config
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError
from jaxembed.files import read_json
from jaxembed.hub.export_adapters import export_adapters
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")
MNTP = {"name": "mntp", "mask_rate": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base with a head of its own, one without, pairs, and the texts of the pairs."""
    root = write_base_and_data(tmp_path_factory.mktemp("tokens"))
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    write_jsonl(root / "texts.jsonl", [{"text": f"{row['query']} {row['pos'][0]}"} for row in rows])
    tiny.write_folder(root / "with_head", "mistral", head=True)
    tiny.write_folder(root / "without_head", "mistral")
    tiny.write_folder(root / "encoder", "bert")
    return root


def make_token_config(
    folder: Path, run: str, *objectives: dict[str, Any], sources: tuple[str, ...] = ("texts",), **keys: Any
) -> Config:
    listed = [{"path": str(folder / f"{name}.jsonl")} for name in sources]
    overrides = [f"data.sources={json.dumps(listed)}", f"objectives={json.dumps(objectives)}", "eval.sets=[]"]
    overrides += [f"model.base={folder / keys.pop('base', 'with_head')}", *(f"{k}={v}" for k, v in keys.items())]
    return make_config(folder, run, *overrides)


def test_a_run_that_predicts_tokens_learns_and_resumes_exactly(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "jaxembed"):
        result = train(make_token_config(folder, "mntp", MNTP))
    losses = read_losses(folder / "mntp")
    assert result["step"] == 12 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    assert any(message.startswith("texts (text): 96 texts; ") for message in caplog.messages)
    assert read_json(folder / "mntp" / "base.json")["has_head"] is True
    # Resumed after the first checkpoint.
    resumed = make_token_config(folder, "resumed", MNTP)
    assert copy_run_at_first_checkpoint(folder / "mntp", resumed) < 12
    train(resumed)
    assert read_losses(folder / "resumed")[-8:] == losses[-8:]
    # The trained run is a model.
    assert Embedder.load(str(folder / "mntp")).encode(["a text"]).shape == (1, 32)


def test_the_three_steps_of_llm2vec(folder: Path) -> None:
    """MNTP, SimCSE under dropout, and pairs. The adapters load with peft on the base and give the vectors of the run."""
    texts, pairs = ({"sources": [{"path": str(folder / f"{name}.jsonl")}]} for name in ("texts", "pairs"))
    stages = [
        {"train": {"steps": 1}, "objectives": [MNTP], "data": texts},
        {"train": {"steps": 2, "dropout": {"hidden": 0.1, "attention": 0.3}}, "data": {**texts, "hard_negatives": 0}},
        {"train": {"steps": 1}, "data": pairs},
    ]
    base = f"model.base={folder / 'with_head'}"
    train(make_staged_config(folder, "llm2vec", stages, base, "model.lora={rank: 4}", "eval.sets=[]"))
    losses = read_losses(folder / "llm2vec")
    assert len(losses) == 4 and losses[1] > 0.01  # two equal vectors would have almost no loss
    embedder = Embedder.load(str(folder / "llm2vec"))
    export_adapters(folder / "llm2vec", folder / "adapters", "last")
    exported = Embedder.load(str(folder / "adapters"))
    np.testing.assert_allclose(exported.encode(["a text"]), embedder.encode(["a text"]), atol=1e-5)


def test_tokens_and_vectors_in_one_stage_after_one_of_tokens(folder: Path) -> None:
    """With adapters, under which the head is frozen."""
    sources = [{"path": str(folder / "texts.jsonl")}, {"path": str(folder / "pairs.jsonl")}]
    stages = [
        {"train": {"steps": 1}, "objectives": [MNTP], "data": {"sources": sources[:1]}},
        {"train": {"steps": 2}, "objectives": [{**MNTP, "batch_size": 8}, {"name": "infonce"}], "data": {"sources": sources}},
    ]
    base = f"model.base={folder / 'with_head'}"
    config = make_staged_config(folder, "staged", stages, base, "model.lora={rank: 4}", "eval.sets=[]")
    assert train(config)["step"] == 3
    rows = [json.loads(line) for line in (folder / "staged" / "metrics.jsonl").read_text().splitlines()]
    both = [row for row in rows if "infonce" in row]
    assert len(both) == 2 and all(row["loss"] == pytest.approx(row["infonce"] + row["mntp"], rel=1e-5) for row in both)
    _, reports = json.loads((folder / "staged" / "data.json").read_text())
    assert [report.get("objective") for report in reports] == [None, "mntp"]
    assert train(config)["step"] == 3  # resumes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base": "encoder"}, "objectives.0: mntp trains a causal language model, but {folder}/encoder is an encoder (bert)"),
        ({"model.attention": "causal"}, "objectives.0: mntp predicts tokens from both sides, but model.attention is causal"),
        (
            {"sources": ("pairs",)},
            'mntp needs sources of format text (rows with a "text"), but the stage has none (found pairs: pairs). Add one.',
        ),
        ({"base": "without_head"}, "objectives.0: mntp needs a language-model head, but {folder}/without_head has none"),
        ({"objectives.0.mask_token": "'<none>'"}, "objectives.0.mask_token: is '<none>', which is not a token of the base's"),
        ({"objectives.0.batch_size": 1000}, "train.batch_size: 1000 is more than the examples of the sources (96)"),
    ],
)  # fmt: skip
def test_errors(folder: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        train(make_token_config(folder, f"refused-{len(message)}", MNTP, **keys))
    assert message.format(folder=folder) in str(error.value)


def test_no_source_is_left_for_vectors(folder: Path) -> None:
    with pytest.raises(UserError, match="objectives: no source is left for infonce, because all of them train objectives"):
        train(make_token_config(folder, "refused", MNTP, {"name": "infonce"}))
