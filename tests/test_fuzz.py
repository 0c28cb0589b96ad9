"""Fuzz tests: reading a file with any content succeeds, or ends in a one-line error that names the file or the key."""

from __future__ import annotations

import copy
import csv
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
from helpers.loading import load_model
from jaxembed.config import LoraConfig, SourceConfig, load_config
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data import schema
from jaxembed.data.beir import open_beir, write_beir
from jaxembed.data.containers import open_container
from jaxembed.data.rows import IndexedRows, RowSchema
from jaxembed.data.sources import open_source
from jaxembed.devices.mesh import make_mesh
from jaxembed.encode import read_texts
from jaxembed.errors import UserError
from jaxembed.formats.peft import write_adapters
from jaxembed.formats.weights import load_params, save_params
from jaxembed.hub.base import FolderBase
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import SPEC_FILE, write_spec
from jaxembed.model.embedder import EmbeddingModel
from jaxembed.model.families import DecoderConfig
from jaxembed.model.parameters import shapes_and_shardings
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
    {"text": "t", "label": None},
    {"query": "q", "pos": ["p"], "neg": None, "prompt": None},
]
CHECKS = {
    "pair": schema.check_pair, "label": schema.check_label, "scored": schema.check_scored, "nli": schema.check_nli,
    "corpus": schema.check_beir_document, "query": schema.check_beir_query, "few_shot": schema.check_few_shot_example,
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


def iter_tree_paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry of a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from iter_tree_paths(value, (*path, key))


@st.composite
def altered_trees(draw: st.DrawFn, tree: Any) -> Any:
    """Draw a copy of a tree with entries replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(list(iter_tree_paths(tree)) or [("new",)]))
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
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a copy of some bytes with bits flipped, or bytes cut off, inserted or removed; or draw other bytes."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=200))
    position = draw(st.integers(0, len(content)))
    change = draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if change == "cut":
        return content[:position]
    if change == "insert":
        return content[:position] + draw(st.binary(min_size=1, max_size=8)) + content[position:]
    if change == "remove":
        return content[:position] + content[position + draw(st.integers(1, 8)) :]
    flipped = bytearray(content)
    for index in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        flipped[index] ^= draw(st.integers(1, 255))
    return bytes(flipped)


def encode_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def assert_succeeds_or_names(call: Callable[[], object], *names: str) -> None:
    """Assert that a call succeeds, or raises a `UserError` with a short one-line message that contains one of `names`."""
    try:
        call()
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert len(message) < 2100
        assert any(name in message for name in names), message


@given(st.binary(max_size=300) | damaged_bytes(yaml.safe_dump(CONFIG).encode()))
@example(b"&a {model: *a}")
@example(b"train: {seed: 0x" + b"f" * 5000 + b"}")
@example(b"run: {name: 0x" + b"f" * 5000 + b"}")
@example(b"[" * 5000)
def test_config_with_any_bytes(content: bytes) -> None:
    with temporary_folder() as folder:
        (folder / "c.yaml").write_bytes(content)
        assert_succeeds_or_names(lambda: load_config(folder / "c.yaml"), "c.yaml")


@given(trees | altered_trees(CONFIG))
def test_config_with_any_tree(tree: Any) -> None:
    with temporary_folder() as folder:
        (folder / "c.yaml").write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8")
        assert_succeeds_or_names(lambda: load_config(folder / "c.yaml"), "c.yaml")


KEYS = [".".join(map(str, path)) for path in iter_tree_paths(CONFIG)]


@given(st.lists(st.text(max_size=12) | st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=8)), max_size=3))
@example(["model=", "model.base=x"])
@example(["run.name={}"])
@example([f"train.steps={'9' * 5000}"])
def test_override_with_any_text(overrides: list[str]) -> None:
    with temporary_folder() as folder:
        (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
        assert_succeeds_or_names(lambda: load_config(folder / "c.yaml", overrides), "c.yaml", "override ")


rows = st.lists(st.sampled_from(ROWS).flatmap(lambda row: altered_trees(row) | st.just(row)) | trees, max_size=3)
lines = rows.map(lambda rows: b"\n".join(map(encode_json, rows)) + b"\n")
line_files = lines | lines.flatmap(damaged_bytes)


@pytest.mark.parametrize("check", CHECKS)
@given(content=line_files)
def test_jsonl_with_any_content(check: str, content: bytes) -> None:
    with temporary_folder() as folder:
        (folder / "a.jsonl").write_bytes(content)

        def read() -> None:
            indexed = IndexedRows(open_container(str(folder / "a.jsonl")), RowSchema(check, CHECKS[check]))
            for index in range(len(indexed)):
                assert CHECKS[check](indexed[index]) is None, "a checked row is read back differently"

        assert_succeeds_or_names(read, "a.jsonl")


@given(line_files, st.sampled_from(["auto", "pairs", "labels", "scored_pairs", "text", "nli", "documents"]))
@example(b'{"query": "q", "pos": ["p"]}\n\x0c\n', "auto")
@example(encode_json({"sentence1": "a", "sentence2": "b", "score": 10**29}) + b"\n" + encode_json(ROWS[2]), "auto")
def test_source_with_any_content(content: bytes, kind: Any) -> None:
    with temporary_folder() as folder:
        path = folder / "a.jsonl"
        path.write_bytes(content)

        def draw() -> None:
            templates: Any = [{"query": "{title}", "positive": "{text}"}] if kind == "documents" else ()
            config = SourceConfig(path=str(path), format=kind, pair_templates=templates)
            source = open_source(config, folder)
            for index in range(len(source)):
                source.draw(index, np.random.default_rng(0), 2)
            assert all(schema.check_pair(row) is None for row in source.iter_pairs())

        assert_succeeds_or_names(draw, "a.jsonl")


@given(st.sampled_from(["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"]), st.data())
def test_beir_folder_with_any_content(name: str, data: st.DataObject) -> None:
    with temporary_folder() as folder:
        write_beir(folder / "b", {"d1": "one", "d2": "two"}, {"q1": "first"}, {"q1": {"d1": 1}})
        path = folder / "b" / name
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes()) | line_files))
        assert_succeeds_or_names(lambda: open_beir(folder / "b", ("test",)), "corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


judgments = st.tuples(
    st.sampled_from(["q1", "q2", "q9"]),
    st.sampled_from(["d1", "d2", "x1", "x2"]),
    st.sampled_from([1, 2, 0, -1]) | st.floats(0.001, 5).map(lambda grade: round(grade, 3)),
)


@given(st.lists(judgments, max_size=8, unique_by=lambda judgment: judgment[:2]), st.booleans())
def test_every_positive_judgment_of_a_known_query_counts(lines: list[tuple[str, str, float]], has_header: bool) -> None:
    expected: dict[str, dict[str, float]] = {}
    for query, document, grade in lines:
        if grade > 0 and query != "q9":
            expected.setdefault(query, {})[document] = grade
    with temporary_folder() as folder:
        write_beir(folder / "b", {"d1": "one", "d2": "two"}, {"q1": "first", "q2": "second"}, {})
        header = ["query-id\tcorpus-id\tscore"] if has_header else []
        content = [*header, *(f"{query}\t{document}\t{grade}" for query, document, grade in lines), ""]
        (folder / "b" / "qrels" / "test.tsv").write_text("\n".join(content))
        if not expected:
            with pytest.raises(UserError, match=r"qrels/test\.tsv: no query has a relevant document"):
                open_beir(folder / "b", ("test",))
            return
        beir = open_beir(folder / "b", ("test",))
        found = {}
        for index, grades in enumerate(beir.relevant):
            known = {row: f"d{row + 1}" for row in (0, 1)}
            found[f"q{beir.query_rows[index] + 1}"] = sorted((known.get(row, "absent"), grade) for row, grade in grades.items())
        assert found == {
            query: sorted((document if document[0] == "d" else "absent", grade) for document, grade in grades.items())
            for query, grades in expected.items()
        }


ENDINGS = [".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet", ".array_record", "", ".md", ".gz"]
endings = st.sampled_from(ENDINGS).flatmap(lambda ending: st.sampled_from([ending, ending.upper(), ending.title()]))


@given(line_files, endings)
@example(b"text\n\xc3\xa9\n", ".csv")
@example(b'text\n"', ".CSV")
@example(b'a\n"b\n\n', "")
def test_texts_with_any_content(content: bytes, ending: str) -> None:
    with temporary_folder() as folder:
        path = folder / f"in{ending}"
        path.write_bytes(content)
        assert_succeeds_or_names(lambda: list(read_texts(str(path), "text")), path.name)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=8), min_size=1), endings)
@example(["{"], "")
def test_all_commands_read_the_same_texts_by_ending(texts: list[str], ending: str) -> None:
    kind = ending.lower()
    if not all(map(schema.is_text, texts)) or (kind == "" and texts[0][0] == "\ufeff"):
        return
    with temporary_folder() as folder:
        path = folder / f"in{ending}"
        if kind in (".csv", ".tsv"):
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, delimiter="," if kind == ".csv" else "\t", quoting=csv.QUOTE_ALL)
                writer.writerows([["text"], *([text] for text in texts)])
        elif kind == ".txt":
            path.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
        else:
            path.write_bytes(b"".join(encode_json({"text": text}) + b"\n" for text in texts) + b"\n")

        def read_rows() -> list[str]:
            rows = IndexedRows(open_container(str(path)), RowSchema("text", schema.check_text))
            return [rows[index]["text"] for index in range(len(rows))]

        if kind in (".parquet", ".array_record", ".md", ".gz"):
            for read in (read_rows, lambda: list(read_texts(str(path), "text"))):
                with pytest.raises(UserError, match=path.name):
                    read()
            return
        without_mark = [text.removeprefix("\ufeff") for text in texts] if kind == ".txt" else texts
        assert read_rows() == list(read_texts(str(path), "text")) == without_mark


@given(line_files)
def test_metrics_with_any_content(content: bytes) -> None:
    with temporary_folder() as folder:
        (folder / "metrics.jsonl").write_bytes(content)
        assert_succeeds_or_names(lambda: read_metrics(folder), "metrics.jsonl")


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
def get_shapes(decoder: DecoderConfig, spec: EmbeddingSpec) -> tuple[Any, Any]:
    return shapes_and_shardings(EmbeddingModel(decoder, spec), make_mesh(1))


def load_base_params(folder: Path) -> None:
    """Open a base and load its parameters."""
    base = find_base(str(folder))
    assert isinstance(base, FolderBase)
    shapes, shardings = get_shapes(base.decoder, base.spec)
    load_params(base.folder, base.decoder.layers, shapes, shardings)


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
            base.load(*get_shapes(base.decoder, base.spec))

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
