"""TensorFlow Datasets are read without TensorFlow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from jaxembed.data.containers import open_container
from jaxembed.data.rows import IndexedRows
from jaxembed.data.sources import ROW_SCHEMAS
from jaxembed.errors import UserError


def open_rows(path: str, cache: Path | None = None) -> IndexedRows:
    return IndexedRows(open_container(path), ROW_SCHEMAS["pairs"], cache)


class RowsTestTiny(tfds.core.GeneratorBasedBuilder):
    """Eight pairs with a label."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)  # of the module, which no package holds

    def _info(self) -> Any:
        text, label = tfds.features.Text(), tfds.features.ClassLabel(names=["bad", "good"])
        features = {"query": text, "pos": tfds.features.Sequence(text), "label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager: Any) -> Any:
        return {"train": ((i, {"query": f"é{i}", "pos": [f"p{i}", "r"], "label": i % 2}) for i in range(8))}

    def _generate_examples(self) -> Any:
        raise AssertionError("`_split_generators` returns the examples")


@pytest.mark.parametrize("name", ["rows_test_tiny", "mnist", "glue/sst2"])
def test_absent_tensorflow_datasets_are_not_downloaded(name: str) -> None:
    message = f"no such dataset in .*tensorflow_datasets. Create it with `tfds build {name} --file_format=array_record`, or set"
    with pytest.raises(UserError, match=f"^tfds:{name}:train: {message}"):
        open_rows(f"tfds:{name}:train")


def test_tensorflow_datasets_are_read_without_tensorflow(tmp_path: Path) -> None:
    RowsTestTiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path)
    rows = open_rows("tfds:rows_test_tiny:train", tmp_path)
    sorted_rows = sorted((row["query"], row["pos"], row["label"]) for row in map(rows.__getitem__, range(len(rows))))
    assert sorted_rows == [(f"é{i}", [f"p{i}", "r"], ["bad", "good"][i % 2]) for i in range(8)]
    assert len(open_rows("tfds:rows_test_tiny:train[:3]", tmp_path)) == 3
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match=r"^tfds:rows_test_tiny:test: cannot be loaded \(Unknown split 'test'"):
        open_rows("tfds:rows_test_tiny:test")
