"""Containers (file types) of rows with any schema, and the index of their rows."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.rows import PAIRS, open_rows, open_source_path
from jaxembed.config import EvalSetConfig
from jaxembed.data import columnar, table_file
from jaxembed.data import rows as rows_module
from jaxembed.data.array_record import write_array_record
from jaxembed.data.containers import open_container
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.rows import RowsAbove
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import open_held_out_sets, score_set

LABELS = [{"text": f"text {i}", "label": "cab"[i % 3]} for i in range(20)]


def write_parquet(path: Path, rows: Sequence[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=4)


WRITERS: dict[str, Callable[[Path, Sequence[Any]], None]] = {
    ".jsonl": write_jsonl, ".parquet": write_parquet, ".array_record": write_array_record,
}  # fmt: skip


def write_shards(folder: Path, rows: Sequence[Any], suffix: str, count: int = 3, name: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        size = -(-len(rows) // count)
        WRITERS[suffix](folder / f"{name}-{i:05d}-of-{count:05d}{suffix}", rows[size * i : size * (i + 1)])
    return folder


@pytest.mark.parametrize("suffix", WRITERS)
def test_all_file_types_return_the_same_rows(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"whole{suffix}", PAIRS)
    folder = write_shards(tmp_path / "shards", PAIRS, suffix)
    for path in (tmp_path / f"whole{suffix}", folder, folder / f"train-*{suffix}"):
        rows = open_rows(path)
        assert len(rows) == len(PAIRS) and rows.max_value == 2
        assert [rows[i] for i in (24, 0, 9, 8, 10, 16)] == [PAIRS[i] for i in (24, 0, 9, 8, 10, 16)]
        with pytest.raises(IndexError):
            rows[25]
    whole, sharded = open_rows(tmp_path / f"whole{suffix}"), open_rows(folder)
    assert whole.digest == sharded.digest
    write_shards(folder, [*PAIRS[:-1], {"query": "another", "pos": ["p"], "neg": ["n"]}], suffix)
    assert open_rows(folder).digest != whole.digest


@pytest.mark.parametrize(("suffix", "separator"), [(".jsonl", ":"), (".parquet", ": row "), (".array_record", ": record ")])
def test_rows_are_located_by_file_and_line_or_row(tmp_path: Path, suffix: str, separator: str) -> None:
    rows = open_rows(write_shards(tmp_path, PAIRS, suffix))
    for index, (shard, number) in {0: (0, 1), 8: (0, 9), 9: (1, 1), 24: (2, 7)}.items():
        assert rows.locate(index) == f"{tmp_path}/train-0000{shard}-of-00003{suffix}{separator}{number}"


def test_a_plain_text_is_its_own_positive(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffeins\r\n\r\n zwei \n\x0c\u3000\n数学".encode())
    write_jsonl(tmp_path / "b.jsonl", [{"text": "eins"}, {"text": " zwei "}, {"text": "数学"}])
    for name in ("a.txt", "b.jsonl"):
        source = open_source_path(tmp_path / name, tmp_path)
        examples = [source.draw(i, np.random.default_rng(0), 2) for i in range(3)]
        assert [(e.query, e.positive, e.negatives) for e in examples] == [(t, t, ()) for t in ("eins", " zwei ", "数学")]
        assert source.in_batch


def test_columns_rename_fields_and_wrap_single_texts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"question": "q", "answer": "a", "wrong": ["w", "v"], "query": "else"}])
    write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "wrong": ["w", "v"]}])
    columns = {"query": "question", "pos": "answer", "neg": "wrong"}
    for name in ("a.parquet", "a.jsonl"):
        assert open_rows(tmp_path / name, **columns)[0] == {"query": "q", "pos": ["a"], "neg": ["w", "v"]}
        example = open_source_path(tmp_path / name, tmp_path, columns=columns).draw(0, np.random.default_rng(0), 2)
        assert (example.query, example.positive, example.negatives) == ("q", "a", ("w", "v"))
        texts = open_source_path(tmp_path / name, tmp_path, columns={"text": "answer"}, format="text")
        assert texts.sampler.rows[0]["text"] == "a"
    (tmp_path / "queries.jsonl").touch()
    with pytest.raises(UserError, match=r"a BEIR folder has fixed fields. Remove `columns`\.$"):
        open_source_path(tmp_path, tmp_path, columns=columns)
    message = (
        r"a.jsonl: no row has the column 'wrnog', which `columns` names for neg \(the first row has question, answer, .*\)\.$"
    )
    with pytest.raises(UserError, match=message):
        open_rows(tmp_path / "a.jsonl", **columns | {"neg": "wrnog"})
    message = r'a.jsonl:1: "query" is missing \(.*\)\. The row has question, answer, wrong \(with columns {"query": "quest"'
    for options in ({}, {"format": "pairs"}):
        with pytest.raises(UserError, match=message):
            open_source_path(tmp_path / "a.jsonl", tmp_path, columns=columns | {"query": "quest"}, **options)


def test_the_fields_of_a_row_do_not_replace_a_missing_column(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"answer": None, **PAIRS[0]}])
    for field, column, message in [
        ("query", "quest", r'"query" is missing \(expected a non-empty string\)\. The row has answer, query, pos, neg'),
        ("neg", "wrong", r"no row has the column 'wrong', .* for neg \(the first row has answer, query, pos"),
        ("pos", "answer", r'"pos" is missing \(expected a list of non-empty strings'),
    ]:
        with pytest.raises(UserError, match=message):
            open_source_path(tmp_path / "a.jsonl", tmp_path, columns={field: column})


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_null_is_an_absent_field(tmp_path: Path, suffix: str) -> None:
    absent = dict.fromkeys(("neg", "prompt", "pos_scores", "neg_scores"))
    rows = [{"query": "q", "pos": ["p"], **absent}, {"query": "r", "pos": ["p"], "neg": ["n"], "prompt": "i"}]
    WRITERS[suffix](tmp_path / f"a{suffix}", rows)
    assert open_rows(tmp_path / f"a{suffix}")[0] == {"query": "q", "pos": ["p"]}
    example = open_source_path(tmp_path / f"a{suffix}", tmp_path).draw(0, np.random.default_rng(0), 2)
    assert (example.negatives, example.instruction, example.teacher_scores) == ((), "", ())


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_first_row_with_nulls_does_not_change_the_format(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"t{i}", "label": None if i == 0 else "ab"[i % 2]} for i in range(5)]
    WRITERS[suffix](tmp_path / f"a{suffix}", rows)
    source = open_source_path(tmp_path / f"a{suffix}", tmp_path)
    assert (source.format, len(source), source.row_count) == ("labels", 4, 5)
    assert source.sampler.drop_counts == {"rows without a label": 1}


def test_dropped_row_groups_are_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table_file, "MAX_DECODED_BYTES", 1)
    write_parquet(tmp_path / "a.parquet", PAIRS)
    file = columnar.ParquetFile(tmp_path / "a.parquet")
    assert "one of 7 large row groups" in caplog.text and "jaxembed.data convert" in caplog.text
    order = np.random.default_rng(0).permutation(len(PAIRS))
    assert [file.read(int(i)) for i in order] == [PAIRS[i] for i in order]
    assert len(file._decoded_groups) == 1


@pytest.mark.parametrize(
    ("path", "package"),
    [("a.parquet", "pyarrow"), ("hf:a/b:train", "datasets"), ("tfds:a:train", "tensorflow_datasets"), ("saved", "pyarrow")],
)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, package: str) -> None:
    write_parquet(tmp_path / "a.parquet", PAIRS)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    for name in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"need the package {package}\. Install it with: pip install '\.\[data\]'\.$"):
        open_container(path if ":" in path else str(tmp_path / path))


# The damage is placed in the data, not in the padding that ends an ArrayRecord file.
@pytest.mark.parametrize(("suffix", "position"), [(".parquet", 0.3), (".array_record", 0.03)])
def test_truncated_and_damaged_files(tmp_path: Path, suffix: str, position: float) -> None:
    folder = write_shards(tmp_path / "shards", PAIRS * 40, suffix)
    second = folder / f"train-00001-of-00003{suffix}"
    whole = second.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3], b"", b"no such thing" * 20):
        second.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-00001-of-00003{suffix}: not a complete (Parquet|ArrayRecord) file"):
            open_rows(folder)
    start = int(position * len(whole))
    second.write_bytes(whole[:start] + bytes(byte ^ 255 for byte in whole[start : start + 400]) + whole[start + 400 :])
    with pytest.raises(UserError, match=rf"00001-of-00003{suffix}: (row|record) \d+ or a later (row|record) is damaged"):
        open_rows(folder)
    second.unlink()
    with pytest.raises(UserError, match=rf"shards: shard train-00001-of-00003{suffix} is missing\.$"):
        open_rows(folder)


def test_bad_records_are_named(tmp_path: Path) -> None:
    write_array_record(tmp_path / "a.array_record", [*PAIRS[:2], {"query": "q"}])
    with pytest.raises(
        UserError, match=r'a.array_record: record 3: "pos" is missing \(expected a list of .*\)\. The row has query\.$'
    ):
        open_rows(tmp_path / "a.array_record")
    write_array_record(tmp_path / "b.array_record", [["no", "object"]])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"b.array_record: record 1: not a JSON object \(found a list\)\.$"):
        open_rows(tmp_path / "b.array_record")


def test_files_of_one_source_must_match(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", PAIRS, ".parquet")
    write_parquet(folder / "train-00001-of-00003.parquet", LABELS)
    with pytest.raises(UserError, match=r"00003.parquet: the columns are label, text \(expected those of .*: neg, pos"):
        open_rows(folder)
    folder = write_shards(tmp_path / "b", PAIRS, ".jsonl")
    write_jsonl(folder / "train-00001-of-00003.jsonl", LABELS)
    with pytest.raises(UserError, match=r'00001-of-00003.jsonl:1: "query" is missing'):
        open_source_path(folder, tmp_path)
    write_shards(folder, PAIRS, ".jsonl", 2, "test")
    with pytest.raises(UserError, match=r"found several sets of shards \(test-\*.jsonl, train-\*.jsonl\)"):
        open_rows(folder)
    write_parquet(folder / "a.parquet", PAIRS)
    with pytest.raises(UserError, match=r"found files of several types \(.jsonl, .parquet\)"):
        open_rows(folder)
    (tmp_path / "a.xlsx").touch()
    known = ".jsonl, .ndjson, .json, .txt, .csv, .tsv, .parquet, .array_record"
    with pytest.raises(UserError, match=rf"unsupported file type .xlsx \(expected one of {known}\)\.$"):
        open_rows(tmp_path / "a.xlsx")
    with pytest.raises(UserError, match=r"absent-\*.jsonl: no such file or folder\.$"):
        open_rows(tmp_path / "absent-*.jsonl")


def test_an_index_is_built_once_per_version_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    monkeypatch.setattr(rows_module, "FILE_CLOCK_TICK_NS", -(10**9))  # an index may be as young as its file
    write_jsonl(path, PAIRS)
    os.utime(path, ns=(10**18, 10**18))
    scans = []
    iter_checked_rows = rows_module.iter_checked_rows
    monkeypatch.setattr(rows_module, "iter_checked_rows", lambda *args: scans.append(args) or iter_checked_rows(*args))
    first = open_rows(path, cache)
    second = open_rows(path, cache)
    assert len(scans) == 1
    assert (second.digest, second.max_value, [second[i] for i in (24, 3)]) == (first.digest, 2, [PAIRS[24], PAIRS[3]])
    assert open_rows(path, cache, "text", text="query")[4]["text"] == "é 4" and len(scans) == 2  # another schema, another index
    longer = [*PAIRS, {"query": "q", "pos": ["a", "b", "c"]}]
    write_jsonl(path, longer)
    assert (open_rows(path, cache).max_value, len(open_rows(path, cache))) == (3, 26)
    scans.clear()
    os.utime(path, ns=(10**18, 10**18))
    open_rows(path, cache)  # the same size, another time
    assert len(scans) == 1
    for index in (cache / "rows").iterdir():
        for content in (index.read_bytes()[:-9], b"", b"\0" * 100, b"x" * 100, index.read_bytes() + b" "):
            index.write_bytes(content)
            assert open_rows(path, cache)[25] == longer[25]
    assert not list((cache / "rows").glob("unfinished*"))


def test_an_edit_in_place_is_noticed_whatever_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "FILE_CLOCK_TICK_NS", -(10**9))
    path = tmp_path / "a.jsonl"
    write_jsonl(path, PAIRS)
    os.utime(path, ns=(10**18, 10**18))
    before = open_rows(path, tmp_path).digest
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_text(path.read_text().replace("é 7", "é X"))
    os.utime(path, ns=(10**18, 10**18))
    assert path.stat().st_mtime_ns == 10**18
    assert open_rows(path, tmp_path).digest == open_rows(path).digest != before


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".parquet"])
def test_a_file_that_is_truncated_while_in_use_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix in WRITERS:
        WRITERS[suffix](path, LABELS * 400)
    else:
        path.write_text("text,label\n" + "some text,a\n" * 8000)
    container = open_container(str(path))
    *_, (last, _, content) = container.scan()
    assert container.read(last) == content
    os.truncate(path, 100)
    with pytest.raises(UserError, match=rf"a{suffix}: (changed while it was in use|row \d+ or a later row is damaged)"):
        container.read(container.address_limit // 2 if suffix == ".parquet" else 0)


@pytest.mark.parametrize("edit", [lambda lines: lines[:-1], lambda lines: [*lines, "\n"]])
def test_a_file_that_changes_while_its_rows_are_read_in_order_is_an_error(
    tmp_path: Path, edit: Callable[[list[str]], list[str]]
) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, PAIRS)
    rows = open_rows(path)
    assert list(rows) == [rows[i] for i in range(len(rows))]
    path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was in use"):
        list(rows)


def test_an_index_as_young_as_its_file_is_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, PAIRS)
    stat = path.stat()
    open_rows(path, tmp_path)
    content = path.read_text().replace("é 7", "é X")
    path.write_text(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if it had changed within a tick of the clock
    for index in (tmp_path / "rows").iterdir():
        os.utime(index, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_rows(path, tmp_path).digest == open_rows(path).digest


def test_a_bad_row_leaves_no_index(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*PAIRS, {"query": "q"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"a.jsonl:26: "):
            open_rows(tmp_path / "a.jsonl", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "rows").iterdir())


def test_rows_are_read_without_a_writable_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "cache").touch()  # a file where the folder would be
    rows = open_rows(tmp_path / "a.jsonl", tmp_path / "cache")
    assert [rows[i] for i in range(25)] == PAIRS
    assert "cannot be written (Not a directory). The index of" in caplog.text and len(caplog.records) == 1


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    write_jsonl(tmp_path / "a.jsonl", PAIRS)
    monkeypatch.setattr(rows_module, "_write_index", raise_full_disk)
    with pytest.raises(UserError, match=r"a.jsonl: the index cannot be written to .* \(No space left on device\)\. Free some"):
        open_rows(tmp_path / "a.jsonl", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "rows").iterdir())


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
def test_rows_are_found_by_index_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_block: int) -> None:
    monkeypatch.setattr(rows_module, "ROWS_PER_BLOCK", rows_per_block)
    write_jsonl(tmp_path / "a.jsonl", LABELS)
    rows = open_rows(tmp_path / "a.jsonl", schema="labels")
    assert rows.label_names == ("a", "b", "c") and rows.label_counts == (7, 6, 7)
    assert [rows.label_names[int(label)] for label in rows.index_values] == [row["label"] for row in LABELS]
    assert rows.rows_grouped_by_label.tolist() == [*range(1, 20, 3), *range(2, 20, 3), *range(0, 20, 3)]
    scores = np.random.default_rng(0).random(40)
    above = RowsAbove(scores, 0.6)
    assert [above[i] for i in range(len(above))] == np.flatnonzero(scores >= 0.6).tolist()
    assert len(RowsAbove(scores, 2.0)) == 0


def test_a_held_out_set_in_a_parquet_file(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i / 2} for i in range(6)]
    write_parquet(tmp_path / "sts.parquet", rows)
    config = EvalSetConfig(name="sts", kind="sts", path=str(tmp_path / "sts.parquet"))
    (held_out_set,) = open_held_out_sets([config], tmp_path)
    encode = lambda texts, instruction: np.array([[float(text[1:]), 1.0] for text in texts], np.float32)  # noqa: E731
    assert json.dumps(score_set(held_out_set, encode).scores) and held_out_set.metric == "spearman"
