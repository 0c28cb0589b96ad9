"""Containers of rows, whatever their shape, and the index that is kept of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from jaxembed.config import EvalSetConfig, PythonPackagesConfig, SourceConfig
from jaxembed.data import columnar
from jaxembed.data import rows as of_rows
from jaxembed.data.array_record import write_array_record
from jaxembed.data.containers import open_container
from jaxembed.data.jsonl import write_lines
from jaxembed.data.rows import Rows, RowsAbove
from jaxembed.data.sources import SHAPES, Source, open_source
from jaxembed.errors import UserError
from jaxembed.evaluation.heldout import open_sets

PAIRS: list[dict[str, Any]] = [{"query": f"é {i}", "pos": [f"p {i}", "数学"], "neg": [f"n {i}"]} for i in range(25)]
LABELS = [{"text": f"text {i}", "label": "cab"[i % 3]} for i in range(20)]


def write_parquet(path: Path, rows: Sequence[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=4)


WRITERS: dict[str, Callable[[Path, Sequence[Any]], None]] = {
    ".jsonl": write_lines, ".parquet": write_parquet, ".array_record": write_array_record,
}  # fmt: skip


def opened(path: Path | str, cache: Path | None = None, shape: str = "pairs", **columns: str) -> Rows:
    return Rows(open_container(str(path)), SHAPES[shape], cache, columns)


def source(path: Path | str, cache: Path, **options: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **options), PythonPackagesConfig(), cache)


def shards(folder: Path, rows: Sequence[Any], suffix: str, count: int = 3, name: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        size = -(-len(rows) // count)
        WRITERS[suffix](folder / f"{name}-{i:05d}-of-{count:05d}{suffix}", rows[size * i : size * (i + 1)])
    return folder


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_container_holds_the_same_rows(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"whole{suffix}", PAIRS)
    folder = shards(tmp_path / "shards", PAIRS, suffix)
    for path in (tmp_path / f"whole{suffix}", folder, folder / f"train-*{suffix}"):
        rows = opened(path)
        assert len(rows) == len(PAIRS) and rows.largest == 2
        assert [rows[i] for i in (24, 0, 9, 8, 10, 16)] == [PAIRS[i] for i in (24, 0, 9, 8, 10, 16)]
        with pytest.raises(IndexError):
            rows[25]
    whole, parts = opened(tmp_path / f"whole{suffix}"), opened(folder)
    assert whole.digest == parts.digest
    shards(folder, [*PAIRS[:-1], {"query": "another", "pos": ["p"], "neg": ["n"]}], suffix)
    assert opened(folder).digest != whole.digest


def test_a_plain_text_is_its_own_positive(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffeins\r\n\r\n zwei \n\x0c\u3000\n数学".encode())
    write_lines(tmp_path / "b.jsonl", [{"text": "eins"}, {"text": " zwei "}, {"text": "数学"}])
    for name in ("a.txt", "b.jsonl"):
        texts = source(tmp_path / name, tmp_path)
        drawn = [texts.draw(i, np.random.default_rng(0), 2) for i in range(3)]
        assert [(e.query, e.positive, e.negatives) for e in drawn] == [(t, t, ()) for t in ("eins", " zwei ", "数学")]
        assert texts.in_batch


def test_columns_name_fields_and_wrap_single_texts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"question": "q", "answer": "a", "wrong": ["w", "v"], "query": "else"}])
    write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "wrong": ["w", "v"]}])
    columns = {"query": "question", "pos": "answer", "neg": "wrong"}
    for name in ("a.parquet", "a.jsonl"):
        assert opened(tmp_path / name, **columns)[0] == {"query": "q", "pos": ["a"], "neg": ["w", "v"]}
        example = source(tmp_path / name, tmp_path, columns=columns).draw(0, np.random.default_rng(0), 2)
        assert (example.query, example.positive, example.negatives) == ("q", "a", ("w", "v"))
        assert source(tmp_path / name, tmp_path, columns={"text": "answer"}, format="text").sampler.rows[0]["text"] == "a"
    (tmp_path / "queries.jsonl").touch()
    with pytest.raises(UserError, match="columns are of rows; a BEIR folder has its own fields"):
        source(tmp_path, tmp_path, columns=columns)
    with pytest.raises(
        UserError, match=r"a.jsonl: no row has the column 'wrnog', which columns .*; the first row has question, ans"
    ):
        opened(tmp_path / "a.jsonl", **columns | {"neg": "wrnog"})
    told = r'a.jsonl:1: "query" is missing; .*; the row has question, answer, wrong \(under columns {"query": "quest"'
    for options in ({}, {"format": "pairs"}):
        with pytest.raises(UserError, match=told):
            source(tmp_path / "a.jsonl", tmp_path, columns=columns | {"query": "quest"}, **options)
    write_lines(tmp_path / "a.jsonl", [{"answer": None, **PAIRS[0]}])
    for ours, theirs, told in [
        ("query", "quest", '"query" is missing; expected a non-empty string; the row has answer, query, pos, neg'),
        ("neg", "wrong", "no row has the column 'wrong', which columns names for neg; the first row has answer, query, pos"),
        ("pos", "answer", '"pos" holds null; expected non-empty strings'),
    ]:  # a row's own field does not stand in for a column
        with pytest.raises(UserError, match=told):
            source(tmp_path / "a.jsonl", tmp_path, columns={ours: theirs})


def test_a_null_is_an_absent_field(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a.parquet", [{"query": "q", "pos": ["p"], "neg": None}, {"query": "r", "pos": ["p"], "neg": ["n"]}]
    )
    assert opened(tmp_path / "a.parquet")[0] == {"query": "q", "pos": ["p"]}


def test_row_groups_that_are_not_kept_are_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(columnar, "DECODED", 1)
    write_parquet(tmp_path / "a.parquet", PAIRS)
    file = columnar.ParquetFile(tmp_path / "a.parquet")
    assert "7 row groups" in caplog.text and "jaxembed.data convert" in caplog.text
    order = np.random.default_rng(0).permutation(len(PAIRS))
    assert [file.read(int(i)) for i in order] == [PAIRS[i] for i in order]
    assert len(file._kept) == 1


def test_datasets_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = datasets.ClassLabel(names=["bad", "good"])
    made = datasets.Dataset.from_list([{"text": f"t{i}", "label": i % 2} for i in range(6)]).cast_column("label", classes)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "a.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for path in (tmp_path / "saved" / "train", f"hf:{tmp_path / 'parquet'}:train"):
        labels = source(path, tmp_path)
        example = labels.draw(3, np.random.default_rng(0), 1)
        assert (len(labels), example.query, example.positive, example.negatives) == (6, "t3", "good", ("bad",))
    with pytest.raises(UserError, match=r"holds a dataset of several splits; name the folder of one, such as .*/saved/train$"):
        source(tmp_path / "saved", tmp_path)
    with pytest.raises(UserError, match=r'cannot be loaded \(Unknown split "test"'):
        source(f"hf:{tmp_path / 'parquet'}:test", tmp_path)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((*args, options)) or made)
    for name in ("hf:org/name:train", "hf:org/name/part:train[:10]"):
        assert len(source(name, tmp_path)) == 6
    first, second = ("org/name", None, {"split": "train"}), ("org/name", "part", {"split": "train[:10]"})
    assert first in asked and second in asked and len({str(call) for call in asked}) == 2
    with pytest.raises(UserError, match=r"^hf:org/name: expected NAME:SPLIT or NAME/CONFIG:SPLIT, such as hf:NAME:train$"):
        source("hf:org/name", tmp_path)


class RowsTestTiny(tfds.core.GeneratorBasedBuilder):
    """Eight pairs with a label."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        text, label = tfds.features.Text(), tfds.features.ClassLabel(names=["bad", "good"])
        features = {"query": text, "pos": tfds.features.Sequence(text), "label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager: Any) -> Any:
        return {"train": ((i, {"query": f"é{i}", "pos": [f"p{i}", "r"], "label": i % 2}) for i in range(8))}

    def _generate_examples(self) -> Any:
        raise AssertionError("the examples stand in the splits")


def test_datasets_of_tensorflow_are_read_without_it(tmp_path: Path) -> None:
    told = "no such dataset in .*tensorflow_datasets; `tfds build {} --file_format=array_record` makes it there; TFDS_DATA_DIR"
    for name in ("rows_test_tiny", "mnist", "glue/sst2"):  # nothing is downloaded or made
        with pytest.raises(UserError, match=f"^tfds:{name}:train: {told.format(name)}"):
            opened(f"tfds:{name}:train")
    RowsTestTiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path)
    rows = opened("tfds:rows_test_tiny:train", tmp_path)
    found = sorted((row["query"], row["pos"], row["label"]) for row in map(rows.__getitem__, range(len(rows))))
    assert found == [(f"é{i}", [f"p{i}", "r"], ["bad", "good"][i % 2]) for i in range(8)]
    assert len(opened("tfds:rows_test_tiny:train[:3]", tmp_path)) == 3
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match=r"^tfds:rows_test_tiny:test: cannot be loaded \(Unknown split 'test'"):
        opened("tfds:rows_test_tiny:test")


@pytest.mark.parametrize(
    ("path", "package"),
    [("a.parquet", "pyarrow"), ("hf:a/b:train", "datasets"), ("tfds:a:train", "tensorflow_datasets"), ("saved", "datasets")],
)
def test_a_package_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, package: str) -> None:
    write_parquet(tmp_path / "a.parquet", PAIRS)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    for name in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'need the package {package}; pip install "jaxembed\[data\]"$'):
        open_container(path if ":" in path else str(tmp_path / path))


@pytest.mark.parametrize(("suffix", "place"), [(".parquet", 0.3), (".array_record", 0.03)])  # the latter ends in padding
def test_files_that_are_cut_off_or_damaged(tmp_path: Path, suffix: str, place: float) -> None:
    folder = shards(tmp_path / "shards", PAIRS * 40, suffix)
    second = folder / f"train-00001-of-00003{suffix}"
    whole = second.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3], b"", b"no such thing" * 20):
        second.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-00001-of-00003{suffix}: no whole (Parquet|ArrayRecord) file"):
            opened(folder)
    start = int(place * len(whole))
    second.write_bytes(whole[:start] + bytes(byte ^ 255 for byte in whole[start : start + 400]) + whole[start + 400 :])
    with pytest.raises(UserError, match=rf"00001-of-00003{suffix}: (row|record) \d+ or a (row|record) after it is damaged"):
        opened(folder)
    second.unlink()
    with pytest.raises(UserError, match=rf"shards: the shard train-00001-of-00003{suffix} is missing$"):
        opened(folder)


def test_records_that_are_no_rows(tmp_path: Path) -> None:
    write_array_record(tmp_path / "a.array_record", [*PAIRS[:2], {"query": "q"}])
    with pytest.raises(
        UserError, match=r'a.array_record: record 3: "pos" is missing; expected a list of .*; the row has query$'
    ):
        opened(tmp_path / "a.array_record")
    write_array_record(tmp_path / "b.array_record", [["no", "object"]])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"b.array_record: record 1: expected a JSON object, found a list$"):
        opened(tmp_path / "b.array_record")


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", PAIRS, ".parquet")
    write_parquet(folder / "train-00001-of-00003.parquet", LABELS)
    with pytest.raises(UserError, match=r"00001-of-00003.parquet: its columns are label, text; those of .* are neg, pos"):
        opened(folder)
    folder = shards(tmp_path / "b", PAIRS, ".jsonl")
    write_lines(folder / "train-00001-of-00003.jsonl", LABELS)
    with pytest.raises(UserError, match=r'00001-of-00003.jsonl:1: "query" is missing'):
        source(folder, tmp_path)
    shards(folder, PAIRS, ".jsonl", 2, "test")
    with pytest.raises(UserError, match=r"found the shards of several sets \(test-\*.jsonl, train-\*.jsonl\)"):
        opened(folder)
    write_parquet(folder / "a.parquet", PAIRS)
    with pytest.raises(UserError, match=r"found files of several kinds \(.jsonl, .parquet\)"):
        opened(folder)
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match=r"files of .csv are not read; expected one of .jsonl, .txt, .parquet, .array_record$"):
        opened(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"absent-\*.jsonl: no such file or folder$"):
        opened(tmp_path / "absent-*.jsonl")


def test_an_index_is_made_once_and_belongs_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    write_lines(path, PAIRS)
    os.utime(path, ns=(10**18, 10**18))
    scans = []
    scanned = of_rows.read_all
    monkeypatch.setattr(of_rows, "read_all", lambda *args: scans.append(args) or scanned(*args))
    first = opened(path, cache)
    again = opened(path, cache)
    assert len(scans) == 1
    assert (again.digest, again.largest, [again[i] for i in (24, 3)]) == (first.digest, 2, [PAIRS[24], PAIRS[3]])
    assert opened(path, cache, "text", text="query")[4]["text"] == "é 4" and len(scans) == 2  # another shape, another index
    longer = [*PAIRS, {"query": "q", "pos": ["a", "b", "c"]}]
    write_lines(path, longer)
    assert (opened(path, cache).largest, len(opened(path, cache))) == (3, 26)
    scans.clear()
    os.utime(path, ns=(10**18, 10**18))
    opened(path, cache)  # the same size, another time
    assert len(scans) == 1
    for index in (cache / "rows").iterdir():
        for content in (index.read_bytes()[:-9], b"", b"\0" * 100, b"x" * 100, index.read_bytes() + b" "):
            index.write_bytes(content)
            assert opened(path, cache)[25] == longer[25]
    assert not list((cache / "rows").glob("unfinished*"))


def test_an_index_as_young_as_its_file_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, PAIRS)
    stat = path.stat()
    opened(path, tmp_path)
    content = path.read_text().replace("é 7", "é X")
    path.write_text(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if it had changed within a tick of the clock
    for index in (tmp_path / "rows").iterdir():
        os.utime(index, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(path, tmp_path).digest == opened(path).digest


def test_a_bad_row_leaves_no_index(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [*PAIRS, {"query": "q"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"a.jsonl:26: "):
            opened(tmp_path / "a.jsonl", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "rows").iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "cache").touch()  # a file where the folder would be
    rows = opened(tmp_path / "a.jsonl", tmp_path / "cache")
    assert [rows[i] for i in range(25)] == PAIRS
    assert "cannot be written (Not a directory): the index of" in caplog.text and len(caplog.records) == 1


def test_no_room_for_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    write_lines(tmp_path / "a.jsonl", PAIRS)
    monkeypatch.setattr(of_rows, "_write", full)
    with pytest.raises(UserError, match=r"a.jsonl: its index cannot be written to .* \(No space left on device\); make room"):
        opened(tmp_path / "a.jsonl", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "rows").iterdir())


@pytest.mark.parametrize("block", [1, 3, 100])
def test_rows_are_found_by_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(of_rows, "BLOCK", block)
    write_lines(tmp_path / "a.jsonl", LABELS)
    rows = opened(tmp_path / "a.jsonl", shape="labels")
    assert rows.names == ("a", "b", "c") and rows.counts == (7, 6, 7)
    assert [rows.names[int(number)] for number in rows.numbers] == [row["label"] for row in LABELS]
    assert rows.by_label.tolist() == [*range(1, 20, 3), *range(2, 20, 3), *range(0, 20, 3)]
    scores = np.random.default_rng(0).random(40)
    kept = RowsAbove(scores, 0.6)
    assert [kept[i] for i in range(len(kept))] == np.flatnonzero(scores >= 0.6).tolist()
    assert len(RowsAbove(scores, 2.0)) == 0


def test_a_held_out_set_of_any_container(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i / 2} for i in range(6)]
    write_parquet(tmp_path / "sts.parquet", rows)
    config = EvalSetConfig(name="sts", kind="sts", path=str(tmp_path / "sts.parquet"))
    (held,) = open_sets([config], PythonPackagesConfig(), tmp_path)
    encoded = lambda texts, instruction: np.array([[float(text[1:]), 1.0] for text in texts], np.float32)  # noqa: E731
    assert json.dumps(held.score(encoded)) and held.metric == "spearman"
