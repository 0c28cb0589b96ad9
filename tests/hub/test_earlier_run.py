"""A run directory as model.base: a run starts from the model that an earlier run trained, and notices if it changes."""

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

from helpers.runs import make_config, use_one_device, write_base_and_data
from jaxembed import Embedder
from jaxembed.config import Config, LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.batch import Batch, EncoderInput
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.formats.peft import write_adapters
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.frozen_encoder import open_frozen_encoder
from jaxembed.hub.merging import merge_models
from jaxembed.hub.resolve import find_base, find_model
from jaxembed.hub.restore import RunBase
from jaxembed.hub.spec_files import write_spec
from jaxembed.model.transformer import ComputeOptions
from jaxembed.runs.train import train
from jaxembed.training.step import TrainState

QUICK = ("train.steps=1", "train.checkpoint_every=1", "eval.sets=[]", "mesh.data=1")
LORA = 'model.lora={"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a single device, because programs compile faster for it."""
    use_one_device(monkeypatch)


def run(folder: Path, name: str, base: str, *overrides: str, noise: float = 0.0) -> Config:
    """Train `name` from `base` with steps that add normal noise, times `noise`, to the trained parameters.

    These tests do not depend on what a step learns, and a real step takes long to compile.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        random, zero = np.random.default_rng(int(state.step)), jnp.zeros(())
        params = jax.tree.map(lambda x: x + jnp.float32(noise * random.normal(size=x.shape)), state.params)
        return dataclasses.replace(state, params=params, step=state.step + 1), {"loss": zero, "grad_norm": zero}

    run_on_first_process_first = processes.run_on_first_process_first

    def refuse_checkpoints(function: Callable[[], Any]) -> Any:
        """Fail if the function opens checkpoints: Orbax would wait for the other processes, which wait for this one."""
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr("orbax.checkpoint.CheckpointManager", lambda *args, **kwargs: pytest.fail("opened by one process"))
            return run_on_first_process_first(function)

    config = make_config(folder, name, *QUICK, f"model.base={folder / base}", *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxembed.training.stage.make_train_step", lambda *args, **kwargs: step)
        patch.setattr(processes, "run_on_first_process_first", refuse_checkpoints)
        train(config)
    return config


def parameters(model: Embedder) -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_dict(model.params).items()}


def largest_difference(a: Embedder, b: Embedder) -> float:
    a_params, b_params = parameters(a), parameters(b)
    assert a_params.keys() == b_params.keys()
    return max(float(np.abs(x - b_params[path]).max()) for path, x in a_params.items())


def test_run_starts_from_the_best_checkpoint_of_an_earlier_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ("model.attention=causal", "model.pooling={kind: latent_attention, latents: 5}", "model.projection.width=8")
    run(folder, "first", "base", *choices, "train.steps=2", noise=0.1)
    second = run(folder, "second", "first", "data.max_length=48", 'data.sources.0.instructions=["Look it up"]')
    # The second run has the spec of the first one, except for its own choices.
    before, after = Embedder.load(folder / "first"), Embedder.load(folder / "second")
    prompt = "Instruct: Look it up\nQuery:"
    assert after.spec == before.spec.replace(max_length=48, prompts={"query": prompt, "document": "", "pairs": prompt})
    assert (after.spec.attention, after.spec.pooling, after.spec.projection) == ("causal", "latent_attention", 8)
    # Its steps changed nothing, so it has the parameters of the last checkpoint.
    assert largest_difference(before, after) == 0
    assert largest_difference(before, first := Embedder.load(folder / "first", checkpoint="1")) > 0
    monkeypatch.setenv("HOME", str(folder))
    assert Embedder.load("~/first", checkpoint="1").revision == first.revision == "first-1"
    assert isinstance(model := find_model("~/first", "1"), RunBase) and model.step == 1
    # A run can be a frozen encoder too.
    guide = open_frozen_encoder(str(folder / "second"), folder / "cache")
    inputs = [EncoderInput("a", "query", "Find it"), EncoderInput("a", "query", ""), EncoderInput("a", "document", "")]
    expected = [after.encode(["a"], prompt=text)[0] for text in ("Instruct: Find it\nQuery:", prompt, "")]
    np.testing.assert_allclose(guide.encode(inputs), expected, atol=1e-6)
    record = json.loads((folder / "second" / "base.json").read_text())
    assert record["name"] == str(folder / "first")

    train(second)  # its base has not changed
    shutil.rmtree(folder / "first" / "checkpoints" / "2")
    with pytest.raises(UserError, match=rf"second: its base changed \(hash: '{record['hash']}' -> '\w+'\)"):
        train(second)
    with pytest.raises(UserError, match=r"first: its weights do not fit the requested model \(misshapen: projection"):
        run(folder, "wider", "first", "model.projection.width=9")
    shutil.rmtree(folder / "first" / "checkpoints" / "1")
    with pytest.raises(UserError, match=r"first: .*no checkpoint"):
        train(second)


def test_adapters_of_an_earlier_run_are_merged(folder: Path) -> None:
    run(folder, "adapted", "base", LORA, noise=0.1)
    first = Embedder.load(folder / "adapted")
    assert largest_difference(first, Embedder.load(folder / "base")) > 1e-2
    base = find_base(str(folder / "adapted"))
    assert largest_difference(first, load_embedder(base, base.spec, ComputeOptions(), first.mesh)) == 0
    merged, _ = merge_models([str(folder / name) for name in ("base", "adapted")], [0.0, 1.0], "soup", "both")
    assert largest_difference(first, merged) == 0

    # New adapters on the merged model, whose kernels are stored in int8.
    run(folder, "twice", "adapted", LORA.replace('"rank"', '"base_dtype": "int8", "rank"'))
    assert 1e-5 < largest_difference(first, Embedder.load(folder / "twice")) < 1e-2


# jaxembed.json of a run, as the version before instructions were pooled by default wrote it.
EARLIER_SPEC = {
    "attention": "bidirectional", "pooling": "mean", "latents": 512, "pooling_heads": 8, "include_instruction": False,
    "projection": 0, "projection_bias": False, "projection_activation": "identity", "normalize": True, "append_eos": True,
    "eos_as_text": False, "pool_last_instruction_token": False, "pool_text_tokens": False, "echo": "", "plain_echo": "",
    "text_length": 0, "max_length": 32, "instruction_template": "Instruct: {instruction}\nQuery:", "plain_prompt": "",
    "query_suffix": "", "example_template": "",
    "prompts": {"query": "Instruct: Find it\nQuery:", "document": "", "pairs": "Instruct: Find it\nQuery:"},
}  # fmt: skip


NEW_KEYS: dict[str, object] = {
    "matryoshka_dims": [],
    "fixed_prompts": False,
    "hidden_projections": [],
    "instruction_table": "",
    "exit_layers": [],
}


@pytest.mark.parametrize("dropped_key", [None, "include_instruction"])
def test_a_run_that_left_instructions_out_by_default_keeps_doing_so(folder: Path, dropped_key: str | None) -> None:
    name = f"earlier-{dropped_key}"
    run(folder, name, "base")
    path = folder / name / "jaxembed.json"
    assert json.loads(path.read_text()) == EARLIER_SPEC | NEW_KEYS | {"include_instruction": True}
    path.write_text(json.dumps({key: value for key, value in EARLIER_SPEC.items() if key != dropped_key}))
    assert not find_base(str(folder / name)).spec.include_instruction, "encode, evaluate, and export"
    train(make_config(folder, name, *QUICK, f"model.base={folder / 'base'}"))  # resumes after the last step
    assert json.loads(path.read_text()) == EARLIER_SPEC | NEW_KEYS
    later = run(folder, f"after-{name}", name)
    assert not find_base(later.run.dir).spec.include_instruction, "a base decides for the runs that start from it"


def test_peft_folder_is_added_to_an_earlier_run(folder: Path, tmp_path: Path) -> None:
    first = Embedder.load(folder / "adapted")
    random = np.random.default_rng(0)
    q = {name: np.float32(random.normal(size=shape)) for name, shape in (("lora_a", (3, 32, 2)), ("lora_b", (3, 2, 64)))}
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))
    write_adapters(tmp_path, {"decoder": {"layers": {"attention": {"q": q}}}}, lora, str(folder / "adapted"))
    kernel = ("decoder", "layers", "attention", "q", "kernel")
    expected = parameters(first) | {kernel: parameters(first)[kernel] + 2 * q["lora_a"] @ q["lora_b"]}
    for path, x in parameters(Embedder.load(tmp_path)).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-6)


def test_peft_folder_with_a_spec_is_added_to_an_earlier_run_with_another_spec(folder: Path, tmp_path: Path) -> None:
    run(folder, "causal", "base", "model.attention=causal", "model.projection.width=8", noise=0.1)
    q = {"lora_a": np.ones((3, 32, 2), np.float32), "lora_b": np.zeros((3, 2, 64), np.float32)}
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))
    write_adapters(tmp_path, {"decoder": {"layers": {"attention": {"q": q}}}}, lora, str(folder / "causal"))
    spec = EmbeddingSpec(attention="bidirectional", max_length=32)
    write_spec(tmp_path, spec)
    model, base_params = Embedder.load(tmp_path), parameters(Embedder.load(folder / "causal"))
    assert model.spec == spec
    for path, x in parameters(model).items():
        np.testing.assert_array_equal(x, base_params[path])


def test_run_with_several_adapters_is_no_base(folder: Path) -> None:
    record = folder / "adapted" / "base.json"
    record.write_text(record.read_text().replace('"names": []', '"names": ["a", "b"]'))
    with pytest.raises(UserError, match=r"adapted: several adapters \(a, b\)\. Export one .* and name its folder"):
        find_base(str(folder / "adapted"))
