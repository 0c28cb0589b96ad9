"""Families besides the decoders that all tests use: trained, resumed, exported and loaded again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from helpers.runs import copy_run_at_first_checkpoint, make_config, read_losses, use_one_device, write_base_and_data
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub.card import Card
from jaxembed.hub.export import export
from jaxembed.hub.spec_files import write_spec
from jaxembed.hub.torch_model import encode_torch, load_sentence_transformer
from jaxembed.runs.open import open_run
from jaxembed.runs.train import train

PROMPTS = {"query": "ask: ", "document": "text: "}


@pytest.mark.parametrize("family", ["bert", "gemma3_text", "modernbert"])
def test_a_run_resumes_and_is_exported(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_device(monkeypatch)
    write_base_and_data(tmp_path, family)
    options = ("train.steps=4", "train.checkpoint_every=2", "train.eval_every=4", "mesh.data=1")
    train(make_config(tmp_path, "straight", *options))
    losses = read_losses(tmp_path / "straight")
    resumed = make_config(tmp_path, "resumed", *options)
    assert copy_run_at_first_checkpoint(tmp_path / "straight", resumed) == 2
    train(resumed)
    assert read_losses(tmp_path / "resumed") == losses
    # The exported folder is a stock one, and a base for jaxembed.
    model, out = Embedder.load(tmp_path / "resumed"), tmp_path / "out"
    assert export(model, out, "float32", Card("test", "base")).parity.error < 1e-5
    vectors = model.encode(tiny.TEXTS, prompt_name="query")
    stock = load_sentence_transformer(out)
    np.testing.assert_allclose(encode_torch(stock, tiny.TEXTS, model.spec.prompts["query"]), vectors, atol=1e-5)
    np.testing.assert_allclose(Embedder.load(out).encode(tiny.TEXTS, prompt_name="query"), vectors, atol=1e-6)
    assert np.abs(Embedder.load(tmp_path / "base").encode(tiny.TEXTS) - model.encode(tiny.TEXTS)).max() > 1e-3


def test_a_base_with_fixed_prompts_is_trained_with_them(tmp_path: Path) -> None:
    """Each text has the prompt of its side. Instructions are refused, unless a template says where they go."""
    write_base_and_data(tmp_path)
    write_spec(tmp_path / "base", EmbeddingSpec(max_length=32, fixed_prompts=True, prompts=PROMPTS))
    run = open_run(make_config(tmp_path, "fixed", "data.sources.0.instructions=[]"), make_mesh(2))
    sampler = run.stages[0].batch_builder.sampler
    _, prompts = sampler.list_texts(sampler.sample(0, np.arange(4)))
    assert prompts == ["ask: ", "text: ", "text: "] * 4
    assert run.spec.prompts == PROMPTS
    with pytest.raises(UserError, match=r"base reads no instructions, .* \(found instructions of pairs; .* query 'ask: ', "):
        open_run(make_config(tmp_path, "refused"), make_mesh(2))
    free = open_run(make_config(tmp_path, "free", "model.instruction_template='{instruction}: '"), make_mesh(2)).spec
    assert (free.fixed_prompts, free.prompts["query"]) == (False, "Find it: ")
