"""Rows without a label are left out and counted, whatever container they are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.sources import open_source_file
from jaxembed.data.array_record import write_array_record
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.schema import check_nli
from jaxembed.errors import UserError


def write_parquet(path: Path, rows: Sequence[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[Any]], None]] = {
    ".jsonl": write_jsonl, ".parquet": write_parquet, ".array_record": write_array_record,
}  # fmt: skip


def write_class_labels(folder: Path, labels: Sequence[Any], suffix: str) -> Path:
    """Write texts with class labels as a saved dataset, or as rows whose labels are numbers."""
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    if suffix:
        WRITERS[suffix](folder / f"a{suffix}", rows)
        return folder / f"a{suffix}"
    classes = datasets.ClassLabel(names=["bad", "good"])
    datasets.Dataset.from_list(rows).cast_column("label", classes).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("suffix", ["", *WRITERS])
@pytest.mark.parametrize("labels", [[-1, 0, 1, 0, 1], [0, 1, -1, -1, 0, 1], [None, 1, 0]])
def test_rows_without_a_class_are_left_out_and_counted(tmp_path: Path, labels: Sequence[Any], suffix: str) -> None:
    source = open_source_file(write_class_labels(tmp_path, labels, suffix))
    classed = [i for i, label in enumerate(labels) if label in (0, 1)]
    examples = [source.draw(i, np.random.default_rng(0), 5) for i in range(len(source))]
    assert [example.query for example in examples] == [f"t{i}" for i in classed]
    assert all(len(example.negatives) == 1 for example in examples)  # the other class, and none for absent labels
    assert (sum(source.sampler.drop_counts.values()), source.row_count) == (len(labels) - len(classed), len(labels))


def test_minus_one_is_a_label_where_it_cannot_mean_none(tmp_path: Path) -> None:
    path = write_class_labels(tmp_path, [-1, 1, -1, 1], ".jsonl")
    assert len(open_source_file(path)) == 4
    path = write_class_labels(tmp_path, [-1, 0, 1, 1], ".jsonl")
    named = open_source_file(path, label_names={"-1": "bad", "0": "fair", "1": "good"}, label_documents="labels")
    assert len(named) == 4 and named.sampler.drop_counts == {}
    many = write_class_labels(tmp_path, [2, -1, 0, 1, 1, 0, -1, 2], ".jsonl")
    source = open_source_file(many)  # examples are documents
    drawn = [source.draw(i, np.random.default_rng(seed), 4) for i in range(len(source)) for seed in range(9)]
    texts = {text for example in drawn for text in (example.query, example.positive, *example.negatives)}
    assert texts == {"t0", "t2", "t3", "t4", "t5", "t7"}


def test_entailment_rows_without_a_class_are_left_out_and_counted(tmp_path: Path) -> None:
    names = ["entailment", "neutral", "contradiction"]
    labels = [-1, 0, 2, 1, -1]
    rows = [{"premise": f"p{i // 3}", "hypothesis": f"h{i}", "label": label} for i, label in enumerate(labels)]
    dataset = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=names))
    dataset.save_to_disk(tmp_path / "saved")
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{**row, "label": None if row["label"] < 0 else row["label"]} for row in rows])
    for name in ("saved", "a.jsonl", "b.jsonl"):
        source = open_source_file(tmp_path / name)
        assert list(source.iter_pairs()) == [{"query": "p0", "pos": ["h1"], "neg": ["h2"]}]
        assert source.sampler.drop_counts["rows without a label"] == 2


def test_integer_labels_that_pandas_writes_as_floats_are_read(tmp_path: Path) -> None:
    """A column of integers with gaps has floats, and NaN for the gaps."""
    labels = [0.0, 1.0, float("nan"), 1.0, 0.0]
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source_file(tmp_path / "a.parquet", label_names={"0": "bad", "1": "good"})
    drawn = [source.draw(i, np.random.default_rng(0), 1) for i in range(len(source))]
    pairs = [(example.query, example.positive) for example in drawn]
    assert pairs == [("t0", "bad"), ("t1", "good"), ("t3", "good"), ("t4", "bad")]
    assert source.sampler.drop_counts["rows without a label"] == 1
    write_jsonl(tmp_path / "b.jsonl", [{"text": "t", "label": 0.5}])
    with pytest.raises(UserError, match=r'"label" is 0\.5 \(expected a non-empty string or an integer'):
        open_source_file(tmp_path / "b.jsonl")


def test_labels_that_differ_only_in_case_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"t{i}", "label": ["Sport", "sport ", "art"][i % 3]} for i in range(6)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert len(open_source_file(tmp_path / "a.jsonl")) == 6
    assert "the labels 'Sport' and 'sport ' differ only in case, white space or encoding; they count as two" in caplog.text


def test_the_error_of_an_nli_row_names_the_field_that_it_lacks() -> None:
    """The texts may be named sentence1 and sentence2, so a row without a premise could be either."""
    assert (check_nli({"hypothesis": "b", "label": 1}) or "").startswith('"premise" is missing')
    assert (check_nli({"sentence1": "a", "label": 1}) or "").startswith('"sentence2" is missing')
