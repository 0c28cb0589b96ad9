"""Adapters that are merged into the base between stages: the steps of LLM2Vec, against peft, resumed, and exported."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from helpers import tiny
from helpers.runs import make_staged_config, read_losses, write_base_and_data
from jaxembed import Embedder
from jaxembed.config import Config, LoraConfig
from jaxembed.data.jsonl import write_jsonl
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.files import read_json
from jaxembed.formats.weights import to_tensors
from jaxembed.hub.export_adapters import export_adapters
from jaxembed.hub.resolve import find_run
from jaxembed.hub.restore import RestoredRun
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.merged_adapters import merge_trained_adapters
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")
DROPOUT = {"hidden": 0.1, "attention": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_base_and_data(tmp_path_factory.mktemp("merged"))
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    write_jsonl(root / "texts.jsonl", [{"text": f"{row['query']} {row['pos'][0]}"} for row in rows])
    tiny.write_folder(root / "with_head", "mistral", head=True)
    return root


def make_run_config(folder: Path, run: str, **keys: Any) -> Config:
    """Return the config of LLM2Vec's three steps. Every step has a checkpoint."""
    texts, pairs = ({"sources": [{"path": str(folder / f"{name}.jsonl")}]} for name in ("texts", "pairs"))
    stages: list[dict[str, Any]] = [
        {"train": {"steps": 2}, "objectives": [{"name": "mntp", "mask_rate": 0.5}], "data": {**texts, "hard_negatives": 0}},
        {"train": {"steps": 1, "dropout": DROPOUT}, "data": {**texts, "hard_negatives": 0}},
        {"train": {"steps": 2}, "data": pairs},
    ]
    for stage in stages:
        stage["train"] |= {"merge_adapters": True}
    settings = {
        "model.base": folder / "with_head", "model.lora": "{rank: 4}", "eval.sets": "[]",
        "train.checkpoint_every": 1, "train.keep_checkpoints": 9, "optim.warmup_steps": 0, "optim.learning_rate": 0.01,
    }  # fmt: skip
    return make_staged_config(folder, run, stages, *(f"{key}={value}" for key, value in (settings | keys).items()))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    train(make_run_config(folder, "llm2vec"))
    return folder / "llm2vec"


def load(run: Path, step: int) -> Embedder:
    return Embedder.load(str(run), checkpoint=str(step))


def restore(run: Path, step: int) -> RestoredRun:
    return find_run(str(run), run, str(step)).restore(ComputeOptions(), make_mesh(1))


def load_factors(run: Path, step: int) -> dict[str, np.ndarray]:
    """Return both factors of the adapters of a projection."""
    layer = restore(run, step).trained["decoder"]["layers"]["mlp"]["up"]
    return {name: np.asarray(layer[name]) for name in ("lora_a", "lora_b")}


def test_a_stage_starts_from_the_merged_base_of_peft(folder: Path, run: Path) -> None:
    """The folder of merged adapters loads with peft, whose merged weights are those under the next stage's adapters."""
    name = "layers.1.mlp.up_proj.weight"
    base = transformers.AutoModel.from_pretrained(folder / "with_head")
    for stage, step in ((1, 3), (2, 5)):
        before = base.state_dict()[name].numpy().copy()
        base = peft.PeftModel.from_pretrained(base, run / "merged" / f"stage-{stage}").merge_and_unload()  # type: ignore[operator]
        expected = base.state_dict()[name].numpy()
        frozen = to_tensors({"decoder": restore(run, step).frozen["decoder"]}, "mistral")[name]
        np.testing.assert_allclose(frozen[:, :], expected, atol=1e-6)
        assert np.abs(before - expected).max() > 1e-3  # merging changes the base


def test_new_adapters_start_at_zero(run: Path) -> None:
    """After one step of Adam the second factor is at most the learning rate, after two steps of the first stage it is more."""
    before, after = load_factors(run, 2), load_factors(run, 3)
    assert np.abs(before["lora_b"]).max() > 0.011 > np.abs(after["lora_b"]).max() > 0
    assert np.abs(before["lora_a"] - after["lora_a"]).max() > 0.05


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_has_the_same_losses_and_vectors(folder: Path, run: Path, step: int) -> None:
    """Stopped at the end of a stage, or within one, after one merge or two."""
    resumed = make_run_config(folder, f"resumed-{step}")
    copy = folder / f"resumed-{step}"
    shutil.copytree(run, copy)
    (copy / "config.yaml").write_text(resumed.dump())
    for later in range(step + 1, 6):
        shutil.rmtree(copy / "checkpoints" / str(later))
    if step == 2:
        shutil.rmtree(copy / "merged")  # not written yet
    train(resumed)
    assert read_losses(copy)[step:] == read_losses(run)[step:]
    np.testing.assert_array_equal(load(copy, 5).encode(tiny.TEXTS), load(run, 5).encode(tiny.TEXTS))


def test_exported_adapters_are_of_the_base_itself(folder: Path, run: Path, tmp_path: Path) -> None:
    """As jaxembed reads them, and as LLM2Vec does: by peft on the base, with a bidirectional mask and mean pooling."""
    export_adapters(run, tmp_path / "adapters", "last")
    assert read_json(tmp_path / "adapters" / "adapter_config.json")["r"] == 12  # 4 of each stage
    embedder = load(run, 5)
    vectors = embedder.encode(tiny.TEXTS)
    np.testing.assert_allclose(Embedder.load(str(tmp_path / "adapters")).encode(tiny.TEXTS), vectors, atol=1e-5)
    base = transformers.AutoModel.from_pretrained(folder / "with_head", is_causal=False, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters")).eval()
    for ids, vector in zip(embedder.tokenizer(tiny.TEXTS, [""] * len(tiny.TEXTS)).ids, vectors, strict=True):
        with torch.no_grad():
            pooled = model(torch.tensor(ids).long()[None]).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(torch.nn.functional.normalize(pooled, dim=0), vector, atol=1e-5)


def test_the_hash_of_the_model_covers_merged_adapters(folder: Path, run: Path) -> None:
    copy = folder / "changed"
    shutil.copytree(run, copy)
    before = find_run(str(copy), copy).hash()
    shutil.rmtree(copy / "merged" / "stage-1")
    shutil.copytree(copy / "merged" / "stage-2", copy / "merged" / "stage-1")
    assert find_run(str(copy), copy).hash() != before
    shutil.rmtree(copy / "merged" / "stage-1")
    with pytest.raises(UserError, match=r"merged/stage-1/adapter_config\.json: cannot be read"):
        Embedder.load(str(copy))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model.lora": "null"}, "train.merge_adapters merges adapters into the base, but model.lora is not set"),
        ({"optim.restart": "false"}, "train.merge_adapters starts new adapters, but optim.restart is false. Set optim.restart"),
    ],
)
def test_what_cannot_be_merged_is_refused(folder: Path, keys: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run_config(folder, "refused", **keys)


def test_a_failed_write_leaves_no_partial_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *args: Any) -> None:
        (folder / "adapter_config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jaxembed.runs.merged_adapters.write_adapters", fail)
    model = SimpleNamespace(lora=LoraConfig(), transformer=SimpleNamespace(family="qwen3"))
    run: Any = SimpleNamespace(run_dir=tmp_path, base=SimpleNamespace(name="base"), model=model)
    stage: Any = SimpleNamespace(index=1, config=SimpleNamespace(train=SimpleNamespace(merge_adapters=True)))
    with pytest.raises(OSError, match="No space") as error:
        merge_trained_adapters(run, stage, SimpleNamespace(params={"decoder": {}}))  # type: ignore[arg-type]
    assert error.value.filename == str(tmp_path / "merged" / "stage-1")
    assert not list((tmp_path / "merged").iterdir())
