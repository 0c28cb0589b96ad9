"""Fuzz tests: reading a file with any content succeeds, or ends in a one-line error that names the file or the key."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.fuzzing import (
    altered_trees,
    assert_succeeds_or_names,
    damaged_bytes,
    encode_json,
    iter_tree_paths,
    temporary_folder,
    trees,
)
from jaxembed.config import SourceConfig, load_config
from jaxembed.data import schema
from jaxembed.data.beir import open_beir, write_beir
from jaxembed.data.containers import open_container
from jaxembed.data.rows import IndexedRows, RowSchema
from jaxembed.data.sources import open_source
from jaxembed.data.text_input import read_texts
from jaxembed.errors import UserError
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
