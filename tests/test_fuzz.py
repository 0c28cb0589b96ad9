"""Whatever a file holds, reading it succeeds or ends in one line that names the file or the key."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import tiny
from helpers.loading import load as loaded
from jaxembed.config import PythonPackagesConfig, SourceConfig, load_config
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data import schema
from jaxembed.data.beir import open_beir, write_beir
from jaxembed.data.containers import open_container
from jaxembed.data.rows import Rows, RowSchema
from jaxembed.data.sources import open_source
from jaxembed.devices.mesh import make_mesh
from jaxembed.encode import read_texts
from jaxembed.errors import UserError
from jaxembed.formats.peft import write_adapters
from jaxembed.formats.weights import load_params, save_params
from jaxembed.hub.base import SPEC_FILE, find_base, write_spec
from jaxembed.hub.restore import base_params, shapes_and_shardings
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.families import DecoderConfig
from jaxembed.model.lora import LoRA
from jaxembed.training.metrics import read_metrics

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "dir": "runs/a"},
    "model": {"base": "preset:tiny", "pooling": {"kind": "mean"}},
    "data": {
        "max_length": 8,
        "sources": [
            {"path": "a.jsonl", "instructions": ["one"], "label_names": {"a": "b"}},
            {"path": "b.jsonl", "pair_templates": [{"query": "{a}", "positive": "{b}"}], "where": {"c": [1, "d"]}},
        ],
    },
    "objectives": [{"name": "infonce"}],
    "optim": {"learning_rate": 1e-3},
    "train": {"steps": 5},
    "eval": {"sets": [{"name": "s", "path": "b"}]},
}
ROWS: list[dict[str, Any]] = [
    {"query": "q", "pos": ["p", "r"], "neg": ["n"], "prompt": "i"},
    {"text": "t", "label": "a"},
    {"sentence1": "a", "sentence2": "b", "score": 4.5},
    {"premise": "a", "hypothesis": "b", "label": "entailment"},
    {"_id": "d", "title": "t", "text": "u"},
    {"step": 1, "loss": 0.5},
    {"query": "q", "response": "r"},
]
CHECKS = {
    "pair": schema.check_pair, "label": schema.check_label, "scored": schema.check_scored, "nli": schema.check_nli,
    "corpus": schema.check_corpus, "query": schema.check_query, "shot": schema.check_shot,
}  # fmt: skip
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]

numbers = st.one_of(
    st.integers(-2, 5), st.sampled_from([2**31, 2**64, -(2**63), 10**40]), st.floats(), st.booleans(), st.none()
)
names = st.sampled_from(["", "a\nb", "\x00", "\u2028", "\ud83d", "../..", "x" * 300, "preset:tiny", ".nan", "1e400"]) | st.text(
    max_size=6
)
leaves = numbers | names
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of which some entries are replaced or removed, or which has others besides."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(list(places(tree)) or [("new",)]))
        node = tree
        for part in parents:
            node = node[part]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove":
            node.pop(last, None) if isinstance(node, dict) else node.pop(last)
        elif change == "add" and isinstance(node, dict):
            node[draw(names)] = draw(trees)
        else:
            node[last] = draw(trees)
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are flipped, cut off, put in or doubled; or other bytes."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=200))
    at = draw(st.integers(0, len(content)))
    change = draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
    if change == "cut":
        return content[:at]
    if change == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if change == "drop":
        return content[:at] + content[at + draw(st.integers(1, 8)) :]
    flipped = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        flipped[place] ^= draw(st.integers(1, 255))
    return bytes(flipped)


def json_of(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@contextmanager
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def holds(call: Callable[[], object], *named: str) -> None:
    """That a call succeeds, or raises a `UserError` of one line that holds one of `named`."""
    try:
        call()
    except UserError as error:
        told = str(error)
        assert len(told.splitlines()) == 1
        assert len(told) < 2100
        assert any(name in told for name in named), told


@given(st.binary(max_size=300) | damaged(yaml.safe_dump(CONFIG).encode()))
@example(b"&a {model: *a}")
@example(b"train: {seed: 0x" + b"f" * 5000 + b"}")
@example(b"run: {name: 0x" + b"f" * 5000 + b"}")
@example(b"[" * 5000)
def test_a_config_of_any_bytes(content: bytes) -> None:
    with temporary() as folder:
        (folder / "c.yaml").write_bytes(content)
        holds(lambda: load_config(folder / "c.yaml"), "c.yaml")


@given(trees | altered(CONFIG))
def test_a_config_of_any_tree(tree: Any) -> None:
    with temporary() as folder:
        (folder / "c.yaml").write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8")
        holds(lambda: load_config(folder / "c.yaml"), "c.yaml")


KEYS = [".".join(map(str, path)) for path in places(CONFIG)]


@given(st.lists(st.text(max_size=12) | st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=8)), max_size=3))
@example(["model=", "model.base=x"])
@example(["run.name={}"])
@example([f"train.steps={'9' * 5000}"])
def test_any_override(overrides: list[str]) -> None:
    with temporary() as folder:
        (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
        holds(lambda: load_config(folder / "c.yaml", overrides), "c.yaml", "override ")


rows = st.lists(st.sampled_from(ROWS).flatmap(lambda row: altered(row) | st.just(row)) | trees, max_size=3)
lines = rows.map(lambda rows: b"\n".join(map(json_of, rows)) + b"\n")
line_files = lines | lines.flatmap(damaged)


@pytest.mark.parametrize("check", CHECKS)
@given(content=line_files)
def test_jsonl_of_any_content(check: str, content: bytes) -> None:
    with temporary() as folder:
        (folder / "a.jsonl").write_bytes(content)

        def read() -> None:
            opened = Rows(open_container(str(folder / "a.jsonl")), RowSchema(check, CHECKS[check]))
            for index in range(len(opened)):
                assert CHECKS[check](opened[index]) is None, "a row that was checked reads back otherwise"

        holds(read, "a.jsonl")


@given(line_files, st.sampled_from(["auto", "pairs", "labels", "scored_pairs", "text", "nli", "documents"]))
@example(b'{"query": "q", "pos": ["p"]}\n\x0c\n', "auto")
@example(json_of({"sentence1": "a", "sentence2": "b", "score": 10**29}) + b"\n" + json_of(ROWS[2]), "auto")
def test_a_source_of_any_content(content: bytes, kind: Any) -> None:
    with temporary() as folder:
        path = folder / "a.jsonl"
        path.write_bytes(content)

        def draw() -> None:
            templates: Any = [{"query": "{title}", "positive": "{text}"}] if kind == "documents" else ()
            config = SourceConfig(path=str(path), format=kind, pair_templates=templates)
            source = open_source(config, PythonPackagesConfig(), folder)
            for index in range(len(source)):
                source.draw(index, np.random.default_rng(0), 2)
            assert all(schema.check_pair(row) is None for row in source.as_pairs())

        holds(draw, "a.jsonl")


@given(st.sampled_from(["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"]), st.data())
def test_a_beir_folder_of_any_content(name: str, data: st.DataObject) -> None:
    with temporary() as folder:
        write_beir(folder / "b", {"d1": "one", "d2": "two"}, {"q1": "first"}, {"q1": {"d1": 1}})
        path = folder / "b" / name
        path.write_bytes(data.draw(damaged(path.read_bytes()) | line_files))
        holds(lambda: open_beir(folder / "b", ("test",)), "corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


@given(line_files, st.sampled_from([".txt", ".jsonl"]))
def test_texts_of_any_content(content: bytes, suffix: str) -> None:
    with temporary() as folder:
        path = folder / f"in{suffix}"
        path.write_bytes(content)
        holds(lambda: list(read_texts(path, "text")), path.name)


@given(line_files)
def test_metrics_of_any_content(content: bytes) -> None:
    with temporary() as folder:
        (folder / "metrics.jsonl").write_bytes(content)
        holds(lambda: read_metrics(folder), "metrics.jsonl")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with every file that one may have: small, so that most bytes matter."""
    folder = tiny.folder(tmp_path_factory.mktemp("fuzz") / "base", "llama")
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
def copied(base: Path) -> Iterator[Path]:
    with temporary() as folder:
        yield shutil.copytree(base, folder / "base")


@functools.lru_cache(maxsize=4)
def shapes_of(decoder: DecoderConfig, spec: EmbeddingSpec) -> tuple[Any, Any]:
    return shapes_and_shardings(EmbeddingModel(decoder, spec), make_mesh(1))


def opened(folder: Path) -> None:
    """Reads a base as far as its parameters."""
    base = find_base(str(folder))
    assert base.folder is not None
    shapes, shardings = shapes_of(base.decoder, base.spec)
    load_params(base.folder, base.decoder.layers, shapes, shardings)


JSON_FILES = [
    "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
]  # fmt: skip
changes = st.sampled_from([0, -1, 1, 3, 2**20, 2**40, 4.0, "4", "", None, True, False, [], {}, [1], float("nan")]) | trees


@given(st.data())
def test_a_config_json_of_any_content(small: Path, data: st.DataObject) -> None:
    config = json.loads((small / "config.json").read_text())
    tree = copy.deepcopy(config)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
        tree[key] = data.draw(changes)
    family = data.draw(st.sampled_from(["llama", "mistral", "qwen2"]))
    tree = data.draw(st.just(tree | {"model_type": family}) | altered(tree))
    content = data.draw(st.just(json_of(tree)) | damaged(json_of(config)))
    with temporary() as folder:
        (folder / "config.json").write_bytes(content)
        (folder / "model.safetensors").symlink_to(small / "model.safetensors")
        holds(lambda: opened(folder), "config.json", str(folder))


@given(st.sampled_from(JSON_FILES), st.data())
def test_files_beside_the_config_of_any_content(small: Path, name: str, data: st.DataObject) -> None:
    content = (small / name).read_bytes()
    with copied(small) as folder:
        (folder / name).write_bytes(data.draw(damaged(content) | altered(json.loads(content)).map(json_of)))
        holds(lambda: find_base(str(folder)), ".json", str(folder))


NV_EMBED = {
    "model_type": "nvembed",
    "add_eos": True,
    "is_mask_instruction": True,
    "text_config": {"hidden_size": 32, "num_hidden_layers": 2},
    "latent_attention_config": {"num_latents_value": 4, "num_cross_heads": 2, "cross_dim_head": 32},
}


@given(st.data())
def test_a_nested_config_of_any_content(data: st.DataObject) -> None:
    content = data.draw(damaged(json_of(NV_EMBED)) | altered(NV_EMBED).map(json_of))
    with temporary() as folder:
        (folder / "config.json").write_bytes(content)
        holds(lambda: find_base(str(folder)), "config.json", str(folder))


@pytest.fixture(scope="module")
def adapters(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder on the small base."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = LoRA(2, 4.0, targets=("q_proj", "up_proj"))
    write_adapters(folder, loaded(small, EmbeddingSpec(), lora=lora)[1], lora, str(small))
    return folder


@given(st.data())
def test_adapters_of_any_content(adapters: Path, data: st.DataObject) -> None:
    with temporary() as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            content = (adapters / name).read_bytes()
            broken = damaged(content)
            if name.endswith(".json"):
                broken |= altered(json.loads(content)).map(json_of)
            (folder / name).write_bytes(data.draw(st.just(content) | broken))

        def read() -> None:
            base = find_base(str(folder))
            base_params(base, *shapes_of(base.decoder, base.spec))

        holds(read, "adapter_", str(folder), "base_model_name_or_path", "neither a folder")


@given(st.data())
def test_a_spec_of_any_content(small: Path, data: st.DataObject) -> None:
    with temporary() as folder:
        (folder / "config.json").symlink_to(small / "config.json")
        write_spec(folder, EmbeddingSpec(prompts={"query": "q"}))
        content = (folder / SPEC_FILE).read_bytes()
        (folder / SPEC_FILE).write_bytes(data.draw(damaged(content) | altered(json.loads(content)).map(json_of)))
        holds(lambda: find_base(str(folder)), SPEC_FILE)


@st.composite
def weight_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose bytes are damaged near its header, or whose header says other things."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    kind = draw(st.sampled_from(["bytes", "header", "tensor", "shorter"]))
    if kind == "bytes":
        return draw(damaged(content[: 8 + length])) + rest
    if kind == "shorter":
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
        tree = draw(altered(tree))
    made = json_of(tree)
    return struct.pack("<Q", len(made)) + made + rest


@given(st.data())
def test_weights_of_any_content(small: Path, data: st.DataObject) -> None:
    with temporary() as folder:
        (folder / "config.json").symlink_to(small / "config.json")
        (folder / "model.safetensors").write_bytes(data.draw(weight_files((small / "model.safetensors").read_bytes())))
        holds(lambda: opened(folder), "model.safetensors", str(folder))


@given(st.data())
def test_a_weight_index_of_any_content(small: Path, data: st.DataObject) -> None:
    index = {"metadata": {}, "weight_map": {"norm.weight": "model.safetensors", "embed_tokens.weight": "model.safetensors"}}
    with temporary() as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(small / name)
        content = data.draw(damaged(json_of(index)) | altered(index).map(json_of))
        (folder / "model.safetensors.index.json").write_bytes(content)
        holds(lambda: opened(folder), "model.safetensors", str(folder))
