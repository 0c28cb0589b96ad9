"""Adapters as PEFT folders, both ways, against the peft package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from helpers import tiny
from helpers.runs import command, prepare, settings
from jaxembed import Embedder
from jaxembed.errors import UserError
from jaxembed.hub.export import export_adapters
from jaxembed.runs.train import train

SHORT = ("train.steps=1", "eval.sets=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("peft"))


def written_by_peft(base: Path, out: Path, head: bool = False, **options: Any) -> Any:
    """A PEFT model with random adapters on the base, saved in `out`."""
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options)
    model = peft.get_peft_model(auto.from_pretrained(str(base)), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(out))
    return model


def mean_vectors(model: Any, ours: Embedder) -> np.ndarray:
    """Unit mean vectors by PyTorch of the token ids that `ours` would see."""
    vectors = []
    for ids in ours.tokenizer(tiny.TEXTS, [""] * len(tiny.TEXTS)).ids:
        with torch.no_grad():
            hidden = model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states[-1][0]
        vectors.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("head", [False, True])
def test_what_peft_writes_is_read(folder: Path, tmp_path: Path, head: bool) -> None:
    model = written_by_peft(folder / "base", tmp_path / "adapters", head)
    tiny.tokenizer().save_pretrained(tmp_path / "adapters")
    (tmp_path / "adapters" / "jaxembed.json").write_text('{"attention": "causal", "max_length": 64}')
    ours = Embedder.load(tmp_path / "adapters")
    assert ours.spec.attention == "causal"
    np.testing.assert_allclose(ours.encode(tiny.TEXTS), mean_vectors(model, ours), atol=1e-5)
    plain = Embedder.load(folder / "base")
    assert np.abs(plain.encode(tiny.TEXTS) - ours.encode(tiny.TEXTS)).max() > 1e-2
    assert ours.revision != plain.revision


def test_what_is_written_peft_reads(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, "run", "model.lora={rank: 4, alpha: 8}", "model.attention=causal", *SHORT, "train.steps=3")
    train(config)
    export_adapters(folder / "run", tmp_path / "adapters", "last")
    ours = Embedder.load(folder / "run", checkpoint="last")
    base = transformers.AutoModel.from_pretrained(str(folder / "base"))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters")).eval()
    np.testing.assert_allclose(ours.encode(tiny.TEXTS), mean_vectors(theirs, ours), atol=1e-5)
    np.testing.assert_allclose(Embedder.load(tmp_path / "adapters").encode(tiny.TEXTS), ours.encode(tiny.TEXTS), atol=1e-5)
    further = settings(folder, "further", f"model.base={tmp_path / 'adapters'}", *SHORT, "optim.learning_rate=1e-9")
    train(further)
    np.testing.assert_allclose(Embedder.load(folder / "further").encode(tiny.TEXTS), ours.encode(tiny.TEXTS), atol=1e-4)


def test_a_run_without_adapters_has_none_to_write(folder: Path, tmp_path: Path) -> None:
    train(settings(folder, "whole", *SHORT))
    latent = ["model.lora={rank: 2, alpha: 2}", "model.pooling={kind: latent_attention, latents: 2}"]
    train(settings(folder, "latent", *latent, *SHORT))
    for run, told in (("whole", "trained without model.lora"), ("latent", "its pooling was trained too")):
        with pytest.raises(UserError, match=told):
            export_adapters(folder / run, tmp_path / "out", "last")
    done = command("jaxembed.export", str(folder / "base"), str(tmp_path / "out"), "--adapters")
    assert done.returncode == 2
    assert "not a run directory; --adapters needs one" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is .* not supported"),
        ({"r": 0}, "r is 0; expected a whole number"),
        ({"base_model_name_or_path": "/nowhere"}, "/nowhere: neither a folder"),
    ],
)
def test_adapters_of_other_kinds_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    written_by_peft(folder / "base", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=told):
        Embedder.load(tmp_path)


def test_adapters_whose_base_leads_back_to_them_are_refused(folder: Path, tmp_path: Path) -> None:
    names = {"a": str(tmp_path / "b"), "b": str(tmp_path / "a"), "c": str(tmp_path / "c"), "d": "no\0name", "e": "~nobody/x"}
    for name, base in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    for name in names:
        with pytest.raises(UserError, match="leads back to this folder" if name in "abc" else "neither a folder with"):
            Embedder.load(tmp_path / name)


def test_a_folder_around_adapters_names_them(tmp_path: Path) -> None:
    for name in ("sts", "retrieval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    told = rf"holds a folder for each of the adapters retrieval, sts; name one: {tmp_path}/retrieval"
    with pytest.raises(UserError, match=told):
        Embedder.load(tmp_path)


def test_adapters_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    written_by_peft(folder / "base", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = load_file(weights)
    name = next(name for name in whole if "layers.1.self_attn.q_proj.lora_A" in name)
    for changed, told in (
        ({key: x for key, x in whole.items() if key != name}, "layers.1.self_attn.q_proj.lora_A.weight is missing"),
        (whole | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32)}, "holds lm_head.lora_A.weight"),
        (
            {key: x[:, :-1] if "q_proj.lora_A" in key else x for key, x in whole.items()},
            "q from 31 to 64; expected 32",
        ),
    ):
        save_file({key: np.ascontiguousarray(x) for key, x in changed.items()}, weights)
        with pytest.raises(UserError, match=told):
            Embedder.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Embedder.load(tmp_path)
