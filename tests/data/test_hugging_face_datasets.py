"""Datasets of Hugging Face: saved to disk, and named by hub id, config and split."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from helpers.rows import PAIRS, open_rows, open_source_path
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
