"""Adapters as PEFT folders, read and written, compared with the peft package."""

from __future__ import annotations

import dataclasses
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
from helpers.commands import run_command
from helpers.runs import make_config, write_base_and_data
from jaxembed import Embedder, export
from jaxembed.errors import UserError
from jaxembed.formats.peft_config import ADAPTER_FIELDS, read_lora_config
from jaxembed.hub.export_adapters import export_adapters
from jaxembed.runs.train import train

pytestmark = pytest.mark.usefixtures("one_device")

ONE_STEP = ("train.steps=1", "eval.sets=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_data(tmp_path_factory.mktemp("peft"))


def save_random_adapters(base: Path, out: Path, has_head: bool = False, **options: Any) -> Any:
    """Add random adapters to the base with peft, save them in `out`, and return the model."""
    auto_class = transformers.AutoModelForCausalLM if has_head else transformers.AutoModel
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options)
    model = peft.get_peft_model(auto_class.from_pretrained(str(base)), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(out))
    return model


def encode_with_torch(model: Any, embedder: Embedder) -> np.ndarray:
    """Return unit vectors of `tiny.TEXTS` by mean pooling in PyTorch, on the token ids of `embedder`."""
    vectors = []
    for ids in embedder.tokenizer(tiny.TEXTS, [""] * len(tiny.TEXTS)).ids:
        with torch.no_grad():
            hidden = model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states[-1][0]
        vectors.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("has_head", [False, True])
def test_adapters_saved_by_peft_load(folder: Path, tmp_path: Path, has_head: bool) -> None:
    model = save_random_adapters(folder / "base", tmp_path / "adapters", has_head)
    tiny.build_tokenizer().save_pretrained(tmp_path / "adapters")
    (tmp_path / "adapters" / "jaxembed.json").write_text('{"attention": "causal", "max_length": 64}')
    embedder = Embedder.load(tmp_path / "adapters")
    assert embedder.spec.attention == "causal"
    np.testing.assert_allclose(embedder.encode(tiny.TEXTS), encode_with_torch(model, embedder), atol=1e-5)
    base = Embedder.load(folder / "base")
    assert np.abs(base.encode(tiny.TEXTS) - embedder.encode(tiny.TEXTS)).max() > 1e-2
    assert embedder.revision != base.revision


def test_peft_loads_exported_adapters(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder, "run", "model.lora={rank: 4, alpha: 8}", "model.attention=causal", *ONE_STEP, "train.steps=3")
    train(config)
    export_adapters(folder / "run", tmp_path / "adapters", "last")
    ours = Embedder.load(folder / "run", checkpoint="last")
    base = transformers.AutoModel.from_pretrained(str(folder / "base"))
    reference = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters")).eval()
    np.testing.assert_allclose(ours.encode(tiny.TEXTS), encode_with_torch(reference, ours), atol=1e-5)
    np.testing.assert_allclose(Embedder.load(tmp_path / "adapters").encode(tiny.TEXTS), ours.encode(tiny.TEXTS), atol=1e-5)
    further = make_config(folder, "further", f"model.base={tmp_path / 'adapters'}", *ONE_STEP, "optim.learning_rate=1e-9")
    train(further)
    np.testing.assert_allclose(Embedder.load(folder / "further").encode(tiny.TEXTS), ours.encode(tiny.TEXTS), atol=1e-4)


def test_export_of_adapters_refuses_options_that_it_would_ignore() -> None:
    args = export.make_parser().parse_args(["run", "out", "--adapters", "--fsdp", "2"])
    with pytest.raises(UserError, match=r"^--adapters: writes all adapters of a run unchanged\. Omit .* and --fsdp\.$"):
        export.check_adapter_options(args)


def test_export_of_adapters_needs_a_run_that_trained_adapters_only(folder: Path, tmp_path: Path) -> None:
    train(make_config(folder, "whole", *ONE_STEP))
    latent = ["model.lora={rank: 2, alpha: 2, targets: [q_proj]}", "model.pooling={kind: latent_attention, latents: 2}"]
    train(make_config(folder, "latent", *latent, *ONE_STEP))
    for run, message in (
        ("whole", "no adapters .the run was trained without model.lora"),
        ("latent", "its pooling was trained too"),
    ):
        with pytest.raises(UserError, match=message):
            export_adapters(folder / run, tmp_path / "out", "last")
    done = run_command("jaxembed.export", str(folder / "base"), str(tmp_path / "out"), "--adapters")
    assert done.returncode == 2
    assert "not a run directory" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported .expected LORA"),
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern .* is not supported"),
        ({"r": 0}, "r is 0|r: 0"),
        ({"base_model_name_or_path": "/nowhere"}, "/nowhere: neither a folder"),
    ],
)
def test_unsupported_adapters_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_random_adapters(folder / "base", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Embedder.load(tmp_path)


def test_circular_bases_of_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    names = {"a": str(tmp_path / "b"), "b": str(tmp_path / "a"), "c": str(tmp_path / "c"), "d": "no\0name", "e": "~nobody/x"}
    for name, base in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    for name in names:
        with pytest.raises(UserError, match="leads back to this folder" if name in "abc" else "neither a folder with"):
            Embedder.load(tmp_path / name)


def test_error_for_a_folder_of_adapter_folders_lists_them(tmp_path: Path) -> None:
    for name in ("sts", "retrieval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    message = rf"has one folder for each of the adapters retrieval, sts. Choose one, such as {tmp_path}/retrieval"
    with pytest.raises(UserError, match=message):
        Embedder.load(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    save_random_adapters(folder / "base", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_A" in name)
    for changed, message in (
        ({key: x for key, x in tensors.items() if key != name}, "layers.1.self_attn.q_proj.lora_A.weight is missing"),
        (
            tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32)},
            "unexpected tensor lm_head.lora_A.weight",
        ),
        (tensors | {name: tensors[name][:2]}, r"q_proj.lora_A.weight is misshapen \(\(2, 32\); expected \(3, 32\)\)"),
        (tensors | {name: tensors[name][:, :-1]}, "q_proj.lora_A.weight is misshapen"),
        (
            {key: x[:, :-1] if "q_proj.lora_A" in key else x for key, x in tensors.items()},
            r"q maps 31 to 64; expected 32 to 64",
        ),
    ):
        save_file({key: np.ascontiguousarray(x) for key, x in changed.items()}, weights)
        with pytest.raises(UserError, match=message):
            Embedder.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        Embedder.load(tmp_path)


@pytest.mark.parametrize("initialization", ["pissa", "olora", "gaussian", "orthogonal"])
def test_initializations_load_unless_they_change_the_base(folder: Path, tmp_path: Path, initialization: str) -> None:
    options = {"r": 4, "init_lora_weights": initialization}
    model = save_random_adapters(folder / "base", tmp_path, **options)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"init_lora_weights": initialization}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if initialization in ("pissa", "olora"):
        with pytest.raises(
            UserError, match=f"init_lora_weights '{initialization}' is not supported, because it changes the base"
        ):
            Embedder.load(tmp_path)
    else:
        tiny.build_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "jaxembed.json").write_text('{"attention": "causal", "max_length": 64}')
        embedder = Embedder.load(tmp_path)
        np.testing.assert_allclose(embedder.encode(tiny.TEXTS), encode_with_torch(model, embedder), atol=1e-5)


REFUSED_VALUES = {
    "init_lora_weights": ["pissa_niter_4", "corda", "loftq", "lora_ga", "mica", "something new", 1.5, ["pissa"]],
    "use_dora": [True], "use_rslora": [True], "fan_in_fan_out": [True], "bias": ["all", "lora_only"], "revision": ["v2"],
    "modules_to_save": [["embed_tokens"]], "layers_to_transform": [[0], 0], "rank_pattern": [{"q_proj": 1}],
    "alpha_pattern": [{"q_proj": 1}], "megatron_config": [{"a": 1}], "trainable_token_indices": [[1]],
    "velora_config": [{"a": 1}], "alora_invocation_tokens": [[1]], "use_qalora": [True], "monteclora_config": [{"a": 1}],
    "layer_replication": [[[0, 2]]], "lora_bias": [True], "target_parameters": [["mlp"]], "use_bdlora": [True],
    "arrow_config": [{"a": 1}], "kasa_config": [{"a": 1}],
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED_VALUES)
def test_each_variant_of_lora_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "adapter_config.json"
    for value in REFUSED_VALUES[key]:
        path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, key: value}))
        with pytest.raises(UserError, match=rf"adapter_config\.json: {key} .* is not supported"):
            read_lora_config(path)


def test_every_field_of_the_installed_peft_is_on_the_list(tmp_path: Path) -> None:
    """A new field of peft must be read, be refused, or be known to be harmless."""
    config = peft.LoraConfig()
    assert {field.name for field in dataclasses.fields(config)} <= ADAPTER_FIELDS.known
    assert ADAPTER_FIELDS.refused.keys() <= REFUSED_VALUES.keys()
    config.save_pretrained(str(tmp_path))  # the defaults are not refused
    read_lora_config(tmp_path / "adapter_config.json")


def test_pickled_adapters_are_named(folder: Path, tmp_path: Path) -> None:
    save_random_adapters(folder / "base", tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    message = r"adapter_model\.safetensors: only adapter_model\.bin is there, and of the two only safetensors is read\. Load"
    with pytest.raises(UserError, match=message):
        Embedder.load(tmp_path)
