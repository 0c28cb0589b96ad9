"""Fuzz tests of model folders: reading any content succeeds, or ends in a one-line error that names the file or the key."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny
from helpers.fuzzing import (
    altered_trees,
    assert_succeeds_or_names,
    damaged_bytes,
    encode_json,
    temporary_folder,
    trees,
)
from helpers.loading import load_model
from jaxembed.config import LoraConfig
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.devices.mesh import make_mesh
from jaxembed.formats.peft import write_adapters
from jaxembed.formats.weights import load_params, save_params
from jaxembed.hub.base import FolderBase
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import SPEC_FILE, write_spec
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.families import TransformerConfig
from jaxembed.model.parameters import compute_shapes_and_shardings

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base with every file that a base can have. It is small, so that most of its bytes matter."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("fuzz") / "base", "llama")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True, "include_prompt": True}))
    (folder / "2_Dense").mkdir()
    dense = {"in_features": 32, "out_features": 4, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    projection = {"projection": {"kernel": np.zeros((32, 4), np.float32)}}
    save_params(folder / "2_Dense" / "model.safetensors", projection, {"projection": ""}, lambda x: x)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "q: "}}))
    return folder


@contextmanager
def copy_folder(base: Path) -> Iterator[Path]:
    with temporary_folder() as folder:
        yield shutil.copytree(base, folder / "base")


@functools.lru_cache(maxsize=4)
def get_shapes(transformer: TransformerConfig, spec: EmbeddingSpec) -> tuple[Any, Any]:
    return compute_shapes_and_shardings(EmbeddingModel(transformer, spec), make_mesh(1))


def load_base_params(folder: Path) -> None:
    """Open a base and load its parameters."""
    base = find_base(str(folder))
    assert isinstance(base, FolderBase)
    shapes, shardings = get_shapes(base.transformer, base.spec)
    load_params(base.folder, base.transformer, shapes, shardings)


JSON_FILES = [
    "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
]  # fmt: skip
config_values = st.sampled_from([0, -1, 1, 3, 2**20, 2**40, 4.0, "4", "", None, True, False, [], {}, [1], float("nan")]) | trees


@given(st.data())
def test_model_config_with_any_content(small_base: Path, data: st.DataObject) -> None:
    config = json.loads((small_base / "config.json").read_text())
    tree = copy.deepcopy(config)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
        tree[key] = data.draw(config_values)
    family = data.draw(st.sampled_from(["llama", "mistral", "qwen2"]))
    tree = data.draw(st.just(tree | {"model_type": family}) | altered_trees(tree))
    content = data.draw(st.just(encode_json(tree)) | damaged_bytes(encode_json(config)))
    with temporary_folder() as folder:
        (folder / "config.json").write_bytes(content)
        (folder / "model.safetensors").symlink_to(small_base / "model.safetensors")
        assert_succeeds_or_names(lambda: load_base_params(folder), "config.json", str(folder))


@given(st.sampled_from(JSON_FILES), st.data())
def test_other_base_files_with_any_content(small_base: Path, name: str, data: st.DataObject) -> None:
    content = (small_base / name).read_bytes()
    with copy_folder(small_base) as folder:
        (folder / name).write_bytes(data.draw(damaged_bytes(content) | altered_trees(json.loads(content)).map(encode_json)))
        assert_succeeds_or_names(lambda: find_base(str(folder)), ".json", str(folder))


NV_EMBED = {
    "model_type": "nvembed",
    "add_eos": True,
    "is_mask_instruction": True,
    "text_config": {"hidden_size": 32, "num_hidden_layers": 2},
    "latent_attention_config": {"num_latents_value": 4, "num_cross_heads": 2, "cross_dim_head": 32},
}


@given(st.data())
def test_nested_model_config_with_any_content(data: st.DataObject) -> None:
    content = data.draw(damaged_bytes(encode_json(NV_EMBED)) | altered_trees(NV_EMBED).map(encode_json))
    with temporary_folder() as folder:
        (folder / "config.json").write_bytes(content)
        assert_succeeds_or_names(lambda: find_base(str(folder)), "config.json", str(folder))


@pytest.fixture(scope="module")
def adapter_folder(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a PEFT folder for the small base."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "up_proj"))
    write_adapters(folder, load_model(small_base, EmbeddingSpec(), lora=lora)[1], lora, str(small_base))
    return folder


@given(st.data())
def test_adapters_with_any_content(adapter_folder: Path, data: st.DataObject) -> None:
    with temporary_folder() as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            content = (adapter_folder / name).read_bytes()
            broken = damaged_bytes(content)
            if name.endswith(".json"):
                broken |= altered_trees(json.loads(content)).map(encode_json)
            (folder / name).write_bytes(data.draw(st.just(content) | broken))

        def read() -> None:
            base = find_base(str(folder))
            base.load(*get_shapes(base.transformer, base.spec))

        assert_succeeds_or_names(read, "adapter_", str(folder), "base_model_name_or_path", "neither a folder")


@given(st.data())
def test_spec_with_any_content(small_base: Path, data: st.DataObject) -> None:
    with temporary_folder() as folder:
        (folder / "config.json").symlink_to(small_base / "config.json")
        write_spec(folder, EmbeddingSpec(prompts={"query": "q"}))
        content = (folder / SPEC_FILE).read_bytes()
        (folder / SPEC_FILE).write_bytes(
            data.draw(damaged_bytes(content) | altered_trees(json.loads(content)).map(encode_json))
        )
        assert_succeeds_or_names(lambda: find_base(str(folder)), SPEC_FILE)


@st.composite
def weight_files(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a safetensors file that is truncated, has damaged bytes in its header, or has another header."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    kind = draw(st.sampled_from(["bytes", "header", "tensor", "truncated"]))
    if kind == "bytes":
        return draw(damaged_bytes(content[: 8 + length])) + rest
    if kind == "truncated":
        return content[: draw(st.integers(0, len(content)))]
    tree = json.loads(header)
    if kind == "tensor":
        tensor = tree[draw(st.sampled_from(sorted(set(tree) - {"__metadata__"})))]
        tensor["dtype"] = draw(st.sampled_from(["I32", "U32", "F16", "BF16", "F64", "F8_E4M3", "C64", "BOOL", "F4", "X"]))
        if draw(st.booleans()):
            tensor["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 16, 32, 64, 2**40, -1]), max_size=3))
        if draw(st.booleans()):
            tensor["data_offsets"] = draw(st.lists(st.sampled_from([0, 128, 2**40]), max_size=3))
    else:
        tree = draw(altered_trees(tree))
    header = encode_json(tree)
    return struct.pack("<Q", len(header)) + header + rest


@given(st.data())
def test_weights_with_any_content(small_base: Path, data: st.DataObject) -> None:
    with temporary_folder() as folder:
        (folder / "config.json").symlink_to(small_base / "config.json")
        (folder / "model.safetensors").write_bytes(data.draw(weight_files((small_base / "model.safetensors").read_bytes())))
        assert_succeeds_or_names(lambda: load_base_params(folder), "model.safetensors", str(folder))


@given(st.data())
def test_weight_index_with_any_content(small_base: Path, data: st.DataObject) -> None:
    index = {"metadata": {}, "weight_map": {"norm.weight": "model.safetensors", "embed_tokens.weight": "model.safetensors"}}
    with temporary_folder() as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(small_base / name)
        content = data.draw(damaged_bytes(encode_json(index)) | altered_trees(index).map(encode_json))
        (folder / "model.safetensors.index.json").write_bytes(content)
        assert_succeeds_or_names(lambda: load_base_params(folder), "model.safetensors", str(folder))
