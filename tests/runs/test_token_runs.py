"""Runs with objectives that predict tokens: stages, resume, the language-model head, and one-line errors."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import transformers

from helpers import tiny
from helpers.loading import pack_texts
from helpers.runs import copy_run_at_first_checkpoint, make_config, make_staged_config, read_losses, write_base_and_data
from jaxembed import Embedder
from jaxembed.config import Config
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.token_batch import NOT_PREDICTED, TokenText
from jaxembed.errors import UserError
from jaxembed.files import read_json
from jaxembed.formats.weights import open_tensors
from jaxembed.hub.card import read_card
from jaxembed.hub.export import export
from jaxembed.hub.export_adapters import export_adapters
from jaxembed.hub.resolve import find_base
from jaxembed.model.embedder import get_head_table, make_transformer
from jaxembed.model.masks import CAUSAL
from jaxembed.runs.token_report import _show_source
from jaxembed.runs.train import train
from jaxembed.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
MNTP = {"name": "mntp", "mask_rate": 0.5}
CAUSAL_LM = {"name": "causal_lm", "batch_size": 8}
GRIT_KEYS = {"model.attention": "bidirectional", "model.append_eos": "false", "gradcache.rows": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base with a head of its own, one without, pairs, and the texts of the pairs."""
    root = write_base_and_data(tmp_path_factory.mktemp("tokens"))
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    write_jsonl(root / "texts.jsonl", [{"text": f"{row['query']} {row['pos'][0]}"} for row in rows])
    write_jsonl(root / "chats.jsonl", [{"prompt": row["query"], "response": row["pos"][0]} for row in rows])
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


@pytest.fixture(scope="module")
def grit(folder: Path) -> Path:
    """Train GRIT: pairs and conversations in every step, with a head of its own, in chunks of rows. Return the run."""
    sources = ("pairs", "chats")
    config = make_token_config(folder, "grit", {"name": "infonce"}, CAUSAL_LM, sources=sources, **GRIT_KEYS)
    assert train(config)["step"] == 12
    return folder / "grit"


def test_grit_learns_to_answer_and_resumes_exactly(folder: Path, grit: Path) -> None:
    rows = [row for row in read_metrics(grit) if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["infonce"] + row["causal_lm"], rel=1e-5) for row in rows)
    answers = [row["causal_lm"] for row in rows]
    assert np.mean(answers[-3:]) < np.mean(answers[:3]) - 0.3
    assert read_head(folder / "with_head").shape == read_head_of_run(grit).shape
    assert np.abs(read_head(folder / "with_head") - read_head_of_run(grit)).max() > 1e-3  # it is trained
    resumed = make_token_config(folder, "grit-resumed", {"name": "infonce"}, CAUSAL_LM, sources=("pairs", "chats"), **GRIT_KEYS)
    assert copy_run_at_first_checkpoint(grit, resumed) < 12
    train(resumed)
    assert read_losses(folder / "grit-resumed")[-8:] == read_losses(grit)[-8:]


@pytest.mark.parametrize("lora", [False, True])
def test_an_export_of_grit_embeds_and_generates(folder: Path, grit: Path, lora: bool, tmp_path: Path) -> None:
    """Equal vectors under sentence-transformers, which the export checks, and equal logits under the causal mask."""
    run = grit
    if lora:
        run, keys = folder / "grit-lora", {**GRIT_KEYS, "model.lora": "{rank: 4}", "train.steps": 1}
        train(make_token_config(folder, "grit-lora", {"name": "infonce"}, CAUSAL_LM, sources=("pairs", "chats"), **keys))
    embedder = Embedder.load(str(run))
    assert embedder.model.has_head
    card = read_card(run, embedder.revision)
    export(embedder, tmp_path / "out", "float32", card)
    # Logits.
    (prompt,) = re.findall("^prompt = (.*)$", (tmp_path / "out" / "README.md").read_text(), re.MULTILINE)
    assert ast.literal_eval(prompt) == "<s><|user|>\nWhat is a text embedding?\n<|assistant|>\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", is_causal=True)
    inputs = tokenizer(ast.literal_eval(prompt), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
    np.testing.assert_allclose(logits, compute_logits(embedder, inputs["input_ids"].numpy()), atol=2e-5)
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer[0] == logits[-1].argmax()
    # Vectors, also where jaxembed reads the folder, and the next run may start from its head.
    exported = Embedder.load(tmp_path / "out")
    np.testing.assert_allclose(exported.encode(tiny.TEXTS), embedder.encode(tiny.TEXTS), atol=1e-5)
    assert find_base(str(tmp_path / "out")).has_untied_head()


def compute_logits(embedder: Embedder, ids: np.ndarray) -> np.ndarray:
    """Return the logits [T, V] of one text by the causal mask."""
    (packed, _) = pack_texts([ids[0].astype(np.int32)], ids.shape[1])
    transformer = make_transformer(embedder.model, CAUSAL)
    hidden = transformer.apply({"params": embedder.params["decoder"]}, packed)[0]
    return np.asarray(hidden @ get_head_table(embedder.model, embedder.params).T)


def read_head(folder: Path) -> np.ndarray:
    with open_tensors(folder) as tensors:
        return np.asarray(tensors["lm_head.weight"][:])


def read_head_of_run(run: Path) -> np.ndarray:
    embedder = Embedder.load(str(run))
    return np.asarray(get_head_table(embedder.model, embedder.params))


def test_tokens_and_vectors_in_one_stage_after_one_of_tokens(folder: Path) -> None:
    """Answers near those of the base, then masked diffusion beside InfoNCE. With adapters, under which the head is frozen."""
    texts, pairs, chats = ({"path": str(folder / f"{name}.jsonl")} for name in ("texts", "pairs", "chats"))
    answers = {**CAUSAL_LM, "kl_to_base": 0.1}
    diffusion = {
        "name": "mntp", "mask_rate": 0.1, "max_mask_rate": 1.0, "mask_rule": "all", "token_weight": "inverse_rate",
        "predict_from": "same", "batch_size": 8,
    }  # fmt: skip
    stages = [
        {"train": {"steps": 2}, "objectives": [answers], "data": {"sources": [chats]}},
        {"train": {"steps": 2}, "objectives": [diffusion, {"name": "infonce"}], "data": {"sources": [texts, pairs]}},
    ]
    base = f"model.base={folder / 'with_head'}"
    config = make_staged_config(folder, "staged", stages, base, "model.lora={rank: 4}", "eval.sets=[]")
    assert train(config)["step"] == 4
    first, second, *both = [row for row in read_metrics(folder / "staged") if "loss" in row]
    assert first["causal_lm_kl"] == pytest.approx(0, abs=1e-5) and second["causal_lm_kl"] > 1e-5
    assert second["loss"] == pytest.approx(second["causal_lm"] + 0.1 * second["causal_lm_kl"], rel=1e-5)
    assert len(both) == 2 and all(row["loss"] == pytest.approx(row["infonce"] + row["mntp"], rel=1e-5) for row in both)
    _, reports = json.loads((folder / "staged" / "data.json").read_text())
    assert [report.get("objective") for report in reports] == [None, "mntp"]
    assert train(config)["step"] == 4  # resumes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base": "encoder"}, "objectives.0: mntp trains a causal language model, but {folder}/encoder is an encoder (bert)"),
        ({"model.attention": "causal"}, "objectives.0: mntp predicts tokens from both sides, but model.attention is causal"),
        (
            {"sources": ("pairs",)},
            'mntp needs sources of format text (rows with a "text"), but the stage has none (found pairs: pairs). Add one.',
        ),
        (
            {"objectives": [{"name": "infonce"}, CAUSAL_LM]},
            'objectives.1: causal_lm needs sources of format chat (rows with "messages", or with "prompt" and "response"), but '
            "the stage has none (found texts: text). Add one.",
        ),
        (
            {"sources": ("chats",), "objectives": [{**CAUSAL_LM, "kl_to_base": 0.1}]},
            "objectives.0: causal_lm: kl_to_base compares with the frozen base, but model.lora is not set",
        ),
        ({"base": "without_head"}, "objectives.0: mntp needs a language-model head, but {folder}/without_head has none"),
        ({"objectives.0.mask_token": "'<none>'"}, "objectives.0.mask_token: is '<none>', which is not a token of the base's"),
        ({"objectives.0.batch_size": 1000}, "train.batch_size: 1000 is more than the examples of the sources (96)"),
    ],
)  # fmt: skip
def test_errors(folder: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        objectives = keys.pop("objectives", [MNTP])
        train(make_token_config(folder, f"refused-{len(message)}", *objectives, **keys))
    assert message.format(folder=folder) in str(error.value)


def test_texts_without_a_predicted_token_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    texts = [TokenText(np.arange(2), np.array([1, NOT_PREDICTED])), TokenText(np.arange(2), np.full(2, NOT_PREDICTED))]
    source, builder, tokenizer = MagicMock(format="chat"), MagicMock(), MagicMock()
    source.__len__.return_value = 2
    source.sampler.drop_counts = {}
    builder.read_texts.return_value, tokenizer.spec.max_length = texts, 9
    with caplog.at_level("INFO", "jaxembed"):
        report = _show_source(MagicMock(tokenizer=tokenizer), builder, source, 0)
    assert report["predicted"] == 0.25
    assert "  1 of 2 texts have no predicted token: they are too short, or truncated at data.max_length 9" in caplog.messages


def test_no_source_is_left_for_vectors(folder: Path) -> None:
    with pytest.raises(UserError, match="objectives: no source is left for infonce, because all of them train objectives"):
        train(make_token_config(folder, "refused", MNTP, {"name": "infonce"}))
