"""A run directory as model.base: a new run starts from the model that an earlier one trained, and notices another one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers.runs import prepare, settings, use_one_device
from jaxembed import Embedder
from jaxembed.config import Config
from jaxembed.data.batch import Batch, EncoderInput
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.formats.peft import write_adapters
from jaxembed.hub.base import find_base
from jaxembed.hub.embedder import from_base
from jaxembed.hub.frozen_encoder import open_frozen_encoder
from jaxembed.hub.merging import merge_models
from jaxembed.model.decoder import Compute
from jaxembed.model.lora import LoRA
from jaxembed.runs.train import train
from jaxembed.training.step import TrainState

QUICK = ("train.steps=1", "train.checkpoint_every=1", "eval.sets=[]", "mesh.data=1")
LORA = 'model.lora={"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs compile faster."""
    use_one_device(monkeypatch)


def run(folder: Path, name: str, base: str, *overrides: str, moved: float = 0.0) -> Config:
    """Trains `name` from `base`. Each step adds random numbers, `moved` times a normal one, to the trained parameters: what
    a step learns is of no interest here, and compiling it takes long.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        random, zero = np.random.default_rng(int(state.step)), jnp.zeros(())
        params = jax.tree.map(lambda x: x + jnp.float32(moved * random.normal(size=x.shape)), state.params)
        return dataclasses.replace(state, params=params, step=state.step + 1), {"loss": zero, "grad_norm": zero}

    in_turn = processes.in_turn

    def alone(function: Callable[[], Any]) -> Any:
        """What the first of several processes does while others wait may not wait for them, as Orbax would."""
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr("orbax.checkpoint.CheckpointManager", lambda *args, **kwargs: pytest.fail("opened by one process"))
            return in_turn(function)

    config = settings(folder, name, *QUICK, f"model.base={folder / base}", *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxembed.runs.train.make_train_step", lambda *args, **kwargs: step)
        patch.setattr(processes, "in_turn", alone)
        train(config)
    return config


def test_a_run_goes_on_where_an_earlier_one_ended(folder: Path) -> None:
    choices = ("model.attention=causal", "model.pooling={kind: latent_attention, latents: 5}", "model.projection.width=8")
    run(folder, "first", "base", *choices, "train.steps=2", moved=0.1)
    second = run(folder, "second", "first", "data.max_length=48", 'data.sources.0.instructions=["Look it up"]')
    before, after = Embedder.load(folder / "first"), Embedder.load(folder / "second")
    asked = "Instruct: Look it up\nQuery:"
    told = {"max_length": 48, "prompts": {"query": asked, "document": "", "pairs": asked}}
    assert after.spec == before.spec.replace(**told)
    assert (after.spec.attention, after.spec.pooling, after.spec.projection) == ("causal", "latent_attention", 8)
    assert largest_difference(before, after) == 0
    assert largest_difference(before, Embedder.load(folder / "first", checkpoint="1")) > 0
    guide = open_frozen_encoder(str(folder / "second"), folder / "cache")
    got = guide.encode([EncoderInput("a", "query", "Find it"), EncoderInput("a", "query", ""), EncoderInput("a", "document", "")])
    prompts = ("Instruct: Find it\nQuery:", asked, "")
    np.testing.assert_allclose(got, [after.encode(["a"], prompt=prompt)[0] for prompt in prompts], atol=1e-6)
    record = json.loads((folder / "second" / "base.json").read_text())
    assert record["name"] == str(folder / "first")

    train(second)  # its base is what it was
    shutil.rmtree(folder / "first" / "checkpoints" / "2")
    with pytest.raises(UserError, match=rf"second: its base changed \(hash: '{record['hash']}' -> '\w+'\); restore it"):
        train(second)
    with pytest.raises(UserError, match="first: its weights do not fit the model that is asked for; misshapen: projection"):
        run(folder, "wider", "first", "model.projection.width=9")
    shutil.rmtree(folder / "first" / "checkpoints" / "1")
    with pytest.raises(UserError, match="first: this run holds no checkpoint"):
        train(second)


def parameters(model: Embedder) -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_dict(model.params).items()}


def largest_difference(a: Embedder, b: Embedder) -> float:
    ours, theirs = parameters(a), parameters(b)
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(x - theirs[path]).max()) for path, x in ours.items())


def test_adapters_are_merged_before_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    run(folder, "adapted", "base", LORA, moved=0.1)
    first = Embedder.load(folder / "adapted")
    assert largest_difference(first, Embedder.load(folder / "base")) > 1e-2
    base = find_base(str(folder / "adapted"))
    assert largest_difference(first, from_base(base, base.spec, Compute(), first.mesh)) == 0
    both, _ = merge_models([str(folder / name) for name in ("base", "adapted")], [0.0, 1.0], "soup", "both")
    assert largest_difference(first, both) == 0

    run(folder, "twice", "adapted", LORA.replace('"rank"', '"base_dtype": "int8", "rank"'))
    assert 1e-5 < largest_difference(first, Embedder.load(folder / "twice")) < 1e-2, "the merged base is held in int8"
    kernel = ("decoder", "layers", "attention", "q", "kernel")
    random = np.random.default_rng(0)
    q = {name: np.float32(random.normal(size=shape)) for name, shape in (("lora_a", (3, 32, 2)), ("lora_b", (3, 2, 64)))}
    lora = LoRA(2, 4.0, targets=("q_proj",))
    write_adapters(tmp_path, {"decoder": {"layers": {"attention": {"q": q}}}}, lora, str(folder / "adapted"))
    expected = parameters(first) | {kernel: parameters(first)[kernel] + 2 * q["lora_a"] @ q["lora_b"]}
    for path, x in parameters(Embedder.load(tmp_path)).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-6)

    record = folder / "adapted" / "base.json"
    record.write_text(record.read_text().replace('"names": []', '"names": ["a", "b"]'))
    with pytest.raises(UserError, match=r"adapted: has several adapters \(a, b\); export one .* and name its folder"):
        find_base(str(folder / "adapted"))
