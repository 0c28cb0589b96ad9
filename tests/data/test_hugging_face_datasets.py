"""Datasets of Hugging Face: saved to disk, and named by hub id, config and split."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from helpers.rows import PAIRS, open_rows, open_source_path
from jaxembed.data import named_datasets
from jaxembed.data.jsonl import write_jsonl
from jaxembed.errors import UserError


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = datasets.ClassLabel(names=["bad", "good"])
    dataset = datasets.Dataset.from_list([{"text": f"t{i}", "label": i % 2} for i in range(6)]).cast_column("label", classes)
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "a.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for path in (tmp_path / "saved" / "train", f"hf:{tmp_path / 'parquet'}:train"):
        labels = open_source_path(path, tmp_path)
        example = labels.draw(3, np.random.default_rng(0), 1)
        assert (len(labels), example.query, example.positive, example.negatives) == (6, "t3", "good", ("bad",))
    with pytest.raises(UserError, match=r"has several splits \(train\)\. Set split to one .* such as '.*/saved/train'\.$"):
        open_source_path(tmp_path / "saved", tmp_path)
    for path in (tmp_path / "saved", f"hf:{tmp_path / 'parquet'}"):
        assert open_source_path(path, tmp_path, split="train").digest == labels.digest
    with pytest.raises(UserError, match=r'cannot be loaded \(Unknown split "test"'):
        open_source_path(f"hf:{tmp_path / 'parquet'}:test", tmp_path)


@pytest.mark.parametrize("form", ["numpy", "torch", None])
def test_the_stored_format_of_a_saved_dataset_is_cleared(tmp_path: Path, form: str | None) -> None:
    datasets.Dataset.from_list(PAIRS).with_format(form).save_to_disk(tmp_path / "saved")
    rows = open_rows(tmp_path / "saved")
    assert [rows[i] for i in range(3)] == PAIRS[:3]


def test_hugging_face_names_with_a_config_and_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, calls = datasets.Dataset.from_list([{"text": "t"}] * 6), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: calls.append((*args, options)) or dataset)
    for name in ("hf:org/name:train", "hf:org/name/part:train[:10]"):
        assert len(open_source_path(name, tmp_path)) == 6
    first, second = ("org/name", None, {"split": "train"}), ("org/name", "part", {"split": "train[:10]"})
    assert first in calls and second in calls and len({str(call) for call in calls}) == 2
    with pytest.raises(UserError, match=r"^hf:org/name: expected NAME:SPLIT or NAME/CONFIG:SPLIT, such as hf:NAME:train\.$"):
        open_source_path("hf:org/name", tmp_path)


def test_slices_of_splits_are_read_without_a_memory_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 10), ("test", 5)):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(rows)])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(named_datasets, "LibraryRows", None)  # which maps files
    for split in ("train[:4]", "train[-30%:]", "test+train[2:4]", "train[5:]+train[:5]", "train[1:3]+train[1:3]"):
        expected = datasets.load_dataset(str(tmp_path / "data"), split=split)["text"]
        dataset = named_datasets.load_hub_dataset(f"{tmp_path / 'data'}:{split}")
        assert [row["text"] for _, _, row in dataset.scan()] == list(expected)
        assert [dataset.read(i)["text"] for i in range(dataset.address_limit)] == list(expected)
