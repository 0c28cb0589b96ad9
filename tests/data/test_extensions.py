"""File endings, which all commands read in the same way, and the columns of rows."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers.sources import draw_examples, open_source_file, write_jsonl
from jaxembed.config import SourceConfig, load_config
from jaxembed.curation.pool import read_corpus
from jaxembed.data.containers import open_container
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sources import ROW_SCHEMAS, detect_format
from jaxembed.data.text_input import read_texts
from jaxembed.errors import UserError

TEXTS = ["one, two", 'three "four"\nfive', "é🙂"]
CSV_TEXTS = 'id,text\n1,"one, two"\n2,"three ""four""\nfive"\n\n3,é🙂\n\n'
ROWS_OF_JSON = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)) + " \n"
CONTENTS = {
    "a.jsonl": ROWS_OF_JSON, "a.JSONL": ROWS_OF_JSON, "a.ndjson": ROWS_OF_JSON, "a.json": ROWS_OF_JSON, "a": ROWS_OF_JSON,
    "a.csv": CSV_TEXTS, "a.CSV": "\ufeff" + CSV_TEXTS.replace("\n\n", "\r\n"),
    "a.tsv": CSV_TEXTS.replace(",", "\t").replace("\t two", ", two"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_every_command_reads_the_same_texts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENTS[name].encode())
    assert list(read_texts(str(path), "text")) == TEXTS
    assert list(read_corpus([str(path)], tmp_path)) == TEXTS
    source = open_source_file(path)
    assert (source.format, [row["query"] for row in source.iter_pairs()]) == ("text", TEXTS)
    assert [source.draw(i, np.random.default_rng(0), 0).query for i in (2, 0, 1)] == [TEXTS[i] for i in (2, 0, 1)]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a"])
def test_blank_lines_at_the_end_are_skipped(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"one\r\n\n  two\n\n \n")
    assert list(read_texts(str(path), "text")) == ["one", "", "  two"]  # a vector for every line before the last text
    assert [row["query"] for row in open_source_file(path).iter_pairs()] == ["one", "  two"]


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_lines_that_end_in_carriage_returns_alone_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"one\rtwo\r")
    for read in (lambda: list(read_texts(str(path), "text")), lambda: open_source_file(path)):
        with pytest.raises(UserError, match=rf"{name}: its lines end in carriage returns alone .*\. Convert it with: tr"):
            read()
    path.write_bytes(b"one\r")
    assert list(read_texts(str(path), "text")) == ["one"]
    path.write_bytes(b"one\rtwo\nthree\n")  # a carriage return inside a text
    assert list(read_texts(str(path), "text")) == ["one\rtwo", "three"]


@pytest.mark.parametrize("name", ["a.md", "a.gz", "a.jsonl.gz", "a.xlsx", "a.log", "a.npy"])
def test_other_extensions_are_refused_by_all_commands(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "one"}\n')
    for read in (lambda: list(read_texts(str(path), "text")), lambda: list(read_corpus([str(path)], tmp_path)),
                 lambda: open_source_file(path)):  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}: unsupported file type \.\w+ \(expected one of \.jsonl, \.ndjson"):
            read()


def test_a_missing_extension_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jaxembed")
    (tmp_path / "rows").write_text('\n{"text": "one"}\n')
    (tmp_path / "lines").write_text("one\n")
    for _ in range(2):
        assert [list(read_texts(str(tmp_path / name), "text")) for name in ("rows", "lines")] == [["one"], ["one"]]
    assert caplog.messages == [
        f"{tmp_path}/rows: has no extension; read as rows of JSON, because of its first character",
        f"{tmp_path}/lines: has no extension; read as lines of text, because of its first character",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n {"text": "a"}\n]', r"a\.json: holds a JSON list \(expected one row per line\)\. Convert it with: jq"),
        ("a.json", '{\n "text": "a"\n}', r"a\.json:1: not valid JSON"),
        ("a.csv", 'text\n"a', r"a\.csv:2: not valid CSV \(unexpected end of data\)"),
        ("a.csv", 'text\n"a" b\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", "text,id\na\n", r"a\.csv:2: has 1 cells \(expected 2, as the header: text, id\)"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1: two columns are named 'text'"),
        ("a.csv", "text\n\xff", r"a\.csv:2: not valid UTF-8"),
        ("a.csv", "text\n", r"a\.csv: contains no rows"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        open_source_file(tmp_path / name, format="text")


def test_cells_become_the_numbers_and_lists_that_fields_have(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("query,pos,neg,prompt\n2020,a,b,\nq,c,,i\n")
    pairs = IndexedRows(open_container(str(tmp_path / "pairs.csv")), ROW_SCHEMAS["pairs"])
    assert [pairs[0], pairs[1]] == [{"query": "2020", "pos": ["a"], "neg": ["b"]}, {"query": "q", "pos": ["c"], "prompt": "i"}]
    (tmp_path / "scored.csv").write_text("sentence1,sentence2,score\na,b,4.5\n")
    assert next(open_source_file(tmp_path / "scored.csv").iter_pairs()) == {"query": "a", "pos": ["b"]}
    (tmp_path / "bad.csv").write_text("sentence1,sentence2,score\na,b,high\n")
    with pytest.raises(UserError, match=r"bad.csv:2: \"score\" is 'high' \(expected a finite number"):
        open_source_file(tmp_path / "bad.csv")
    (tmp_path / "nli.tsv").write_text("premise\thypothesis\tlabel\np\th\t0\np\ti\t2\np\tj\t-1\n")
    assert list(open_source_file(tmp_path / "nli.tsv").iter_pairs()) == [{"query": "p", "pos": ["h"], "neg": ["i"]}]
    (tmp_path / "labels.csv").write_text("text,label\na,0\nb,1\nc,\nd,-1\ne,0\n")
    assert [row["query"] for row in open_source_file(tmp_path / "labels.csv").iter_pairs()] == ["a", "b", "e"]
    (tmp_path / "codes.csv").write_text("text,label\na,007\nb,7\n")
    assert {row["pos"][0] for row in open_source_file(tmp_path / "codes.csv").iter_pairs()} == {"007", "7"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_several_columns_make_a_list(tmp_path: Path, suffix: str) -> None:
    names = ["anchor", "positive", "negative_1", "negative_2", "score"]
    values: list[list[Any]] = [["a", "p", "n1", "n2", 0.5], ["b", "q", "m1", None, 0.25]]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("\n".join(",".join("" if v is None else str(v) for v in row) for row in [names, *values]))
    else:
        write_jsonl(path, [dict(zip(names, row, strict=True)) for row in values])
    columns = {"query": "anchor", "pos": "positive", "neg": ["negative_1", "negative_2"], "pos_scores": "score"}
    source = open_source_file(path, columns=columns)
    assert (source.format, list(source.iter_pairs())) == ("pairs", [
        {"query": "a", "pos": ["p"], "neg": ["n1", "n2"], "pos_scores": [0.5]},
        {"query": "b", "pos": ["q"], "neg": ["m1"], "pos_scores": [0.25]},
    ])  # fmt: skip
    assert draw_examples(source, 0, 0)[0].teacher_scores == (0.5,)
    with pytest.raises(UserError, match=r"no row has the column 'negative_9', which `columns` names for neg"):
        open_source_file(path, columns=columns | {"neg": ["negative_1", "negative_9"]})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["a", "b"]}, "columns: query: expected one column; a list is for neg, neg_scores, pos, pos_scores"),
        ({"neg": []}, "columns: neg is a list of 0 (expected the name of a column, or a list of names"),
        ({"neg": ["a", 1]}, "columns: neg is a list of 2 (expected the name of a column, or a list of names"),
        ({"query": 3}, "columns: query is 3 (expected the name of a column, or a list of names"),
        ({"quary": "a"}, "unknown key data.sources.0.columns.quary. Did you mean data.sources.0.columns.query?"),
    ],
)
def test_bad_columns_are_named(tmp_path: Path, columns: Any, message: str) -> None:
    tree = {"model": {"base": "x"}, "data": {"sources": [{"path": "a.jsonl", "columns": columns}]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert message in str(error.value)


def test_a_folder_of_any_extension_is_read(tmp_path: Path) -> None:
    for name in ("b.CSV", "a.csv"):
        (tmp_path / name).write_text(f"text\n{name}\n")
    assert list(read_texts(str(tmp_path), "text")) == ["a.csv", "b.CSV"]
    (tmp_path / "c.JSONL").write_text('{"text": "c"}\n')  # the usual endings come first
    assert list(read_texts(str(tmp_path), "text")) == ["c"]
    assert list(read_texts(str(tmp_path / "*.csv"), "text")) == ["a.csv"]


@pytest.mark.parametrize("content", ['{"text": "one"}\n{"text": "two"}\n', "one\ntwo\n\n"])
@pytest.mark.parametrize("name", ["pipe", "pipe.json"])
def test_a_pipe_is_read_once_by_encode_and_refused_by_training(tmp_path: Path, content: str, name: str) -> None:
    path = tmp_path / (name if content[0] == "{" else "pipe.txt")
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"pipe.*: is a pipe or a device, but rows are read more than once"):
        detect_format(SourceConfig(path=str(path)))
    writer = threading.Thread(target=path.write_text, args=(content,))
    writer.start()
    assert list(read_texts(str(path), "text")) == ["one", "two"]
    writer.join()
