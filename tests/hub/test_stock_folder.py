"""The files of an exported folder, of each family and kind. That they give the vectors of the model is shown in test_export."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from helpers.loading import load_model
from jaxembed import Embedder
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.formats import token_pooling
from jaxembed.formats.sentence_transformers import TOKEN_POOLING_FILE
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import write_spec
from jaxembed.hub.stock_folder import write_stock_folder
from jaxembed.hub.text_tokenizer import build_text_tokenizer
from jaxembed.hub.torch_model import load_sentence_transformer

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal last": ("qwen2", {"attention": "causal", "pooling": "last", "prompts": {"query": "q: "}}),
    "bidirectional mean": ("qwen3", {"matryoshka_dims": (16,)}),
    "projection": ("mistral", {"projection": 6, "projection_bias": True, "normalize": False}),
    "latent attention": ("mistral", {"pooling": "latent_attention", "latents": 5, "pooling_heads": 2}),
    "llama": ("llama", {"attention": "causal"}),
}
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, base_folder: Callable[[str], Path]) -> Folders:
    """Write a folder of each kind in bfloat16, which is what the weights are checked for."""
    root, written = tmp_path_factory.mktemp("folders"), {}
    for kind, (family, choices) in KINDS.items():
        spec, base = EmbeddingSpec(max_length=64, **choices), find_base(str(base_folder(family)))
        model, params = load_model(base_folder(family), spec)
        embedder = Embedder(model, params, build_text_tokenizer(base.tokenizer(), spec, base), make_mesh(1), base.hf_config)
        written[kind] = root / kind.replace(" ", "-")
        write_stock_folder(embedder, written[kind], "bfloat16")
        write_spec(written[kind], spec)
    return written


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_files_state_tokens_lengths_and_dtype(folders: Folders, kind: str) -> None:
    folder, (family, choices) = folders[kind], KINDS[kind]
    config, tokenizer_config = read(folder, "config.json"), read(folder, "tokenizer_config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    first = [0] if family == "mistral" else []
    assert tokenizer("a")["input_ids"] == [*first, tokenizer.convert_tokens_to_ids("a"), 1], "BOS and EOS of tokenizer.json"
    assert (tokenizer_config["add_bos_token"], tokenizer_config["add_eos_token"]) == (bool(first), True)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)
    assert (tokenizer_config["model_max_length"], read(folder, "sentence_bert_config.json")["max_seq_length"]) == (64, 64)
    assert config["dtype"] == "bfloat16"
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "embed_tokens.weight" in file.keys()  # noqa: SIM118
    is_guarded = tokenizer_config["tokenizer_class"] == "TokenizersBackend"
    assert is_guarded == (choices.get("attention") != "causal"), "transformers 4 must not load a bidirectional model"


# Fields that TEI reads without a default (backends/candle/src/models/*.rs).
TEI_FIELDS = {
    "qwen2": {"use_sliding_window", "hidden_act"},
    "qwen3": {"use_sliding_window", "hidden_act", "attention_bias", "eos_token_id"},
    "mistral": {"initializer_range", "hidden_act"},
    "llama": {"initializer_range", "hidden_act", "rope_scaling"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_configs_are_complete_and_transformers_reads_them(folders: Folders, kind: str) -> None:
    family, choices = KINDS[kind]
    values = read(folders[kind], "config.json")
    assert TEI_FIELDS[family] <= values.keys()
    config = transformers.AutoConfig.from_pretrained(str(folders[kind]))
    assert config.is_causal == (choices.get("attention") == "causal")
    assert config.rope_parameters == values["rope_parameters"]
    assert values.get("matryoshka_dimensions") == ([16, 32] if kind == "bidirectional mean" else None)


def test_part_files_have_the_weights_of_the_parts(folders: Folders) -> None:
    parts = {"projection": ("2_Dense", {"linear.weight", "linear.bias"}), "latent attention": ("1_TokenPooling", {"latents"})}
    for kind, (name, expected) in parts.items():
        with safe_open(folders[kind] / name / "model.safetensors", "np") as file:
            assert expected <= set(file.keys())
    assert not (folders["latent attention"] / "1_Pooling").exists(), "TEI would leave the latents out"
    assert (folders["latent attention"] / TOKEN_POOLING_FILE.name).is_file()
    assert read(folders["latent attention"], "2_Pooling/config.json")["pooling_mode_mean_tokens"]


def test_sentence_transformers_applies_modules_prompts_and_length(folders: Folders) -> None:
    model = load_sentence_transformer(folders["causal last"])
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert (model[1].pooling_mode, model[1].include_prompt, model.max_seq_length) == ("lasttoken", True, 64)
    assert (model.prompts, model.similarity_fn_name) == ({"query": "q: ", "document": ""}, "cosine")
    model = load_sentence_transformer(folders["projection"])
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense"]


def test_sentence_transformers_refuses_a_transformers_that_ignores_the_mask(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentence_transformers.util.environment.get_installed_version", lambda package: "5.1.0")
    with pytest.raises(
        ImportError, match=r"transformers>=5\.2, but transformers==5\.1\.0 is installed\. Earlier versions ignore"
    ):
        load_sentence_transformer(folders["bidirectional mean"])


def test_folder_of_an_earlier_version_is_read(folders: Folders, tmp_path: Path) -> None:
    """Its module types and keys are those of sentence-transformers 6, and its jaxembed.json lacks newer keys."""
    old = Path(shutil.copytree(folders["projection"], tmp_path / "old"))
    modules = read(old, "modules.json")
    kinds = {"Transformer": "base", "Pooling": "sentence_transformer", "Dense": "base"}
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.{kinds[kind]}.modules.{kind.lower()}.{kind}"
    changes: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": False},
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        },
        "jaxembed.json": {key: value for key, value in read(old, "jaxembed.json").items() if key != "matryoshka_dims"},
    }  # fmt: skip
    changes["jaxembed.json"] |= {"include_instruction": False}
    new_keys = ("use_bidirectional_attention", "rope_theta", "matryoshka_dimensions")
    changes["config.json"] = {key: value for key, value in read(old, "config.json").items() if key not in new_keys}
    for name, value in changes.items():
        (old / name).write_text(json.dumps(value))
    expected = find_base(str(folders["projection"])).spec.replace(include_instruction=False)
    assert find_base(str(old)).spec == expected
    del changes["jaxembed.json"]["include_instruction"]
    (old / "jaxembed.json").write_text(json.dumps(changes["jaxembed.json"]))
    assert find_base(str(old)).spec == expected, "earlier versions left instructions out"
    (old / "jaxembed.json").unlink()
    assert find_base(str(old)).spec.replace(max_length=64) == expected.replace(prompts={"query": "", "document": ""})
    assert load_sentence_transformer(old)[1].include_prompt is False


def test_token_pooling_works_without_the_module_class_of_newer_versions(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sentence-transformers 3 and 4 load a module with its folder as the only argument."""
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modules.module", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers.models", None)
    code = compile(TOKEN_POOLING_FILE.read_text(), str(TOKEN_POOLING_FILE), "exec")
    names: dict[str, Any] = {"__name__": "token_pooling"}
    exec(code, names)
    old_class, folder = names["TokenPooling"], str(folders["latent attention"] / "1_TokenPooling")
    assert old_class.__mro__[1].__module__ == "token_pooling"
    module, current = old_class.load(folder), token_pooling.TokenPooling.load(folder)
    features = {"token_embeddings": torch.ones(1, 3, 32), "attention_mask": torch.ones(1, 3)}
    outputs = [m(dict(features))["token_embeddings"].detach().numpy() for m in (module, current)]
    np.testing.assert_array_equal(*outputs)
    module.save(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == read(folders["latent attention"], "1_TokenPooling/config.json")
    assert old_class.load(str(tmp_path)).state_dict().keys() == current.state_dict().keys()
