"""A run directory as model.base: a new run starts from the model that an earlier one trained, and notices another one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny
from jaxembed import Embedder, parallel
from jaxembed.config import Config
from jaxembed.errors import UserError
from jaxembed.hub.base import find_base
from jaxembed.hub.embedder import from_base
from jaxembed.hub.export import export_adapters
from jaxembed.model.decoder import Compute
from jaxembed.run import train
from runs import prepare, settings

QUICK = (
    "train.steps=1", "train.batch_size=8", "data.hard_negatives=0", "eval.sets=[]", "mesh.data=1", "model.unroll=false",
    "model.attention_kernel=einsum", "optim.warmup_steps=0", "optim.schedule=constant",
)  # fmt: skip
STILL = "optim.learning_rate=1e-9"  # a run whose model stays where it began
LORA = 'model.lora={"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs compile faster."""
    mesh = parallel.make_mesh(1)
    monkeypatch.setattr(parallel, "make_mesh", lambda data=-1: mesh)


def run(folder: Path, name: str, base: str, *overrides: str) -> Config:
    return settings(folder, name, *QUICK, f"model.base={folder / base}", *overrides)


def test_a_run_goes_on_where_an_earlier_one_ended(folder: Path) -> None:
    choices = ("model.attention=causal", "model.pooling={kind: latent_attention, latents: 5}", "model.projection.width=8")
    steps = ("train.steps=2", "train.checkpoint_every=1", "optim.learning_rate=0.01")
    train(run(folder, "first", "base", *choices, *steps))
    second = run(folder, "second", "first", STILL, "data.max_length=48", 'data.sources.0.instructions=["Look it up"]')
    train(second)
    before, after = Embedder.load(folder / "first"), Embedder.load(folder / "second")
    asked = "Instruct: Look it up\nQuery:"
    told = {"max_length": 48, "prompts": {"query": asked, "document": "", "pairs": asked}}
    assert after.spec == dataclasses.replace(before.spec, **told)
    assert (after.spec.attention, after.spec.pooling, after.spec.projection) == ("causal", "latent_attention", 8)
    np.testing.assert_allclose(after.encode(tiny.TEXTS[3:4]), before.encode(tiny.TEXTS[3:4]), atol=1e-5)
    record = json.loads((folder / "second" / "base.json").read_text())
    assert record["name"] == str(folder / "first")

    train(second)  # its base is what it was
    shutil.rmtree(folder / "first" / "checkpoints" / "2")
    with pytest.raises(UserError, match=rf"second: its base changed \(hash: '{record['hash']}' -> '\w+'\); restore it"):
        train(second)
    with pytest.raises(UserError, match="first: its weights do not fit the model that is asked for; misshapen: projection"):
        train(run(folder, "wider", "first", "model.projection.width=9"))
    shutil.rmtree(folder / "first" / "checkpoints" / "1")
    with pytest.raises(UserError, match="first: this run holds no checkpoint"):
        train(second)


def test_adapters_are_merged_before_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    train(run(folder, "adapted", "base", LORA, "optim.learning_rate=0.1"))
    model = Embedder.load(folder / "adapted")
    before = model.encode(tiny.TEXTS)
    assert np.abs(before - Embedder.load(folder / "base").encode(tiny.TEXTS)).max() > 1e-3
    base = find_base(str(folder / "adapted"))
    merged = from_base(base, base.spec, Compute(), model.mesh).encode(tiny.TEXTS)
    np.testing.assert_allclose(merged, before, atol=1e-6)

    train(run(folder, "twice", "adapted", LORA.replace('"rank"', '"base_dtype": "int8", "rank"'), STILL))
    off = np.abs(Embedder.load(folder / "twice").encode(tiny.TEXTS) - before).max()
    assert 1e-5 < off < 0.1, "the merged base is held in int8"
    export_adapters(folder / "twice", tmp_path / "peft", "last")
    exact = Embedder.load(tmp_path / "peft").encode(tiny.TEXTS)  # adapters, untrained, on a run of adapters
    np.testing.assert_allclose(exact, before, atol=1e-5)

    record = folder / "adapted" / "base.json"
    record.write_text(record.read_text().replace('"names": []', '"names": ["a", "b"]'))
    with pytest.raises(UserError, match=r"adapted: has several adapters \(a, b\); export one .* and name its folder"):
        find_base(str(folder / "adapted"))
