"""Saved Hugging Face datasets: read without the library, whatever happens to their files, and one of their splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from helpers.rows import open_source_path
from jaxembed.data.containers import open_container
from jaxembed.errors import UserError


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("hf:a/b:train", "test", r"^hf:a/b:train: names the split train, but split is 'test'\. Remove one of the two\.$"),
        ("a.jsonl", "test", r"a\.jsonl: split is 'test', but this has no splits \(expected .*\)\. Remove split\.$"),
        ("saved", "dev", r"saved: no split 'dev' \(found train, test\)\. Set split to one of them\.$"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path: Path, path: str, split: str, message: str) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=message):
        open_source_path(path if ":" in path else tmp_path / path, tmp_path, split=split)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset_dict.json", '{"splits": "train"}', r"dataset_dict\.json: damaged \(expected a list of names in splits\)"),
        ("state.json", '{"_data_files": [{"filename": "../other/a.arrow"}]}', r"saved: not a complete saved dataset \("),
        ("state.json", '{"_data_files": []}', r"saved: not a complete saved dataset \("),
    ],
)
def test_damaged_files_of_a_saved_dataset_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / file).write_text(content)
    with pytest.raises(UserError, match=message):
        open_source_path(tmp_path / "saved", tmp_path)


def save_batches(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Save a dataset, in batches of three rows, and return its only data file."""
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(folder)
    (path,) = folder.glob("*.arrow")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, dataset.data.schema) as stream:
        stream.write_table(dataset.data.table, max_chunksize=3)
    return path


def test_saved_datasets_are_read_without_a_memory_map(tmp_path: Path) -> None:
    """The rows are those that the library reads. A file that is truncated, at any byte or while it is read, is an error."""
    rows = [{"query": f"q{i} 数学", "pos": [f"p{i}"] * (i % 3 + 1), "n": None if i % 4 else i / 8} for i in range(10)]
    path = save_batches(tmp_path / "saved", rows)
    container = open_container(str(tmp_path / "saved"))
    assert [row for _, _, row in container.scan()] == list(datasets.load_from_disk(tmp_path / "saved"))
    assert [container.read(i) for i in (9, 0, 4)] == [rows[i] for i in (9, 0, 4)]
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"saved/.*\.arrow: cannot be read as a complete Arrow stream \("):
            open_container(str(tmp_path / "saved"))
    path.write_bytes(whole)
    container = open_container(str(tmp_path / "saved"))
    os.truncate(path, len(whole) // 2)
    with pytest.raises(UserError, match=r"\.arrow: row \d+ or a later row is damaged \("):
        [row for _, _, row in container.scan()]
    with pytest.raises(UserError, match=r"\.arrow: row 10 or a later row is damaged \("):
        container.read(9)
