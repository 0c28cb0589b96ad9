"""Rows out of tables: Parquet files, Hugging Face datasets, TensorFlow Datasets. A null is an absent field."""

from __future__ import annotations

import importlib
import logging
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError, brief

DECODED = 256 * 2**20  # bytes of row groups of a file that are kept decoded
AT_ONCE = 1024  # rows decoded together where all are read
SPLIT = re.compile(r"(.+?):([\w.-]+(?:\[.*\])?(?:\+.*)?)")  # a split may be a part, as train[:10%], or a sum of several
log = logging.getLogger(__name__)


def needed(module: str, told: str) -> Any:
    """A module of the extra `data`; `UserError` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{told} need the package {module.partition(".")[0]}; pip install "jaxembed[data]"') from None


class ParquetFile:
    """A Parquet file; an address is the number of a row.

    A row group is decoded whole to read one row of it. Those used last are kept, DECODED bytes of them; where a file's
    groups are more than that, rows drawn at random are slow, and the log says so.
    """

    def __init__(self, path: Path):
        parquet, arrow = needed("pyarrow.parquet", "Parquet files"), needed("pyarrow", "Parquet files")
        self.name = str(path)
        self._one, self._kept = threading.Lock(), OrderedDict[int, Any]()
        self._errors = (OSError, UnicodeDecodeError, arrow.ArrowException)
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
            self.columns = list(self._file.schema_arrow.names)
        except self._errors as error:
            raise UserError(f"{path}: no whole Parquet file ({brief(error)})") from None
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.extent = metadata.num_rows
        self._ends = list(accumulate(group.num_rows for group in groups))
        if len(groups) > 1 and sum(group.total_byte_size for group in groups) > DECODED:
            log.warning(
                "%s: %s row groups, each decoded whole to read one of its rows: convert the file to train on it faster "
                "(python -m jaxembed.data convert)",
                path, f"{len(groups):,}",
            )  # fmt: skip

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Address, file and row, and content of each row."""
        address = 0
        try:
            for batch in self._file.iter_batches(AT_ONCE):
                for row in batch.to_pylist():
                    yield address, f"{self.name}: row {address + 1}", _present(row)
                    address += 1
        except self._errors as error:
            raise self._damaged(address, error) from None

    def read(self, address: int) -> Any:
        """The content of the row there."""
        number = bisect_right(self._ends, address)
        try:
            with self._one:
                row = self._group(number).slice(address - (self._ends[number - 1] if number else 0), 1)
            return _present(row.to_pylist()[0])
        except self._errors as error:
            raise self._damaged(address, error) from None

    def _group(self, number: int) -> Any:
        if number not in self._kept:
            self._kept[number] = self._file.read_row_group(number)
            while len(self._kept) > 1 and sum(group.nbytes for group in self._kept.values()) > DECODED:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _damaged(self, address: int, error: Exception) -> UserError:
        return UserError(f"{self.name}: row {address + 1} or a row after it is damaged ({brief(error)})")


class HubDataset:
    """A split of a Hugging Face dataset; an address is the number of a row. Labels are told by their names."""

    def __init__(self, name: str, dataset: Any):
        self.name, self.extent = name, len(dataset)
        self.files = [Path(part["filename"]) for part in dataset.cache_files]
        self._dataset = dataset
        self._names = _label_names(dataset.features)

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Address, dataset and row, and content of each row."""
        for address, row in enumerate(self._dataset):
            yield address, f"{self.name}: row {address + 1}", self._content(row)

    def read(self, address: int) -> Any:
        """The content of the row there."""
        return self._content(self._dataset[address])

    def _content(self, row: Mapping[str, Any]) -> Any:
        return _named(_present(row), self._names)


def load_hub_dataset(name: str) -> HubDataset:
    """The dataset that NAME:SPLIT or NAME/CONFIG:SPLIT means, fetched from the hub if it is not in its cache."""
    datasets = needed("datasets", "Hugging Face datasets")
    repository, split = _split_of(f"hf:{name}", name)
    parts, config = repository.split("/"), None
    if len(parts) == 3 and parts[0] not in ("", ".", ".."):  # no path of a folder
        repository, config = "/".join(parts[:2]), parts[2]
    try:
        dataset = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"hf:{name}: cannot be loaded ({brief(error)})") from None
    return HubDataset(f"hf:{name}", dataset)


def load_saved_dataset(folder: Path) -> HubDataset:
    """The dataset that `save_to_disk` wrote into a folder."""
    datasets = needed("datasets", "Hugging Face datasets")
    try:
        return HubDataset(str(folder), datasets.Dataset.load_from_disk(str(folder)))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no whole dataset ({brief(error)})") from None


class TfDataset:
    """A split of a dataset of TensorFlow Datasets, read without TensorFlow; an address is the number of an example."""

    def __init__(self, name: str):
        """`name` is NAME/CONFIG:SPLIT, below $TFDS_DATA_DIR or ~/tensorflow_datasets, as `tfds build` leaves it there."""
        tfds = needed("tensorflow_datasets", "TensorFlow Datasets")
        self.name = f"tfds:{name}"
        dataset, split = _split_of(self.name, name)
        try:
            self._source = tfds.core.read_only_builder.builder_from_files(dataset).as_data_source(split=split)
        except tfds.core.DatasetNotFoundError:
            told = f"`tfds build {dataset} --file_format=array_record` makes it there; TFDS_DATA_DIR names another folder"
            raise UserError(f"{self.name}: no such dataset in {tfds.core.constants.DATA_DIR}; {told}") from None
        except (OSError, ValueError, KeyError, ImportError, AssertionError, NotImplementedError) as error:
            raise UserError(f"{self.name}: cannot be loaded ({brief(error)})") from None
        info = self._source.dataset_info
        self.extent = len(self._source)
        self.files = [Path(path) for path in info.splits[split].filepaths]
        self._names = _label_names(info.features)

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Address, dataset and row, and content of each row."""
        for address in range(self.extent):
            yield address, f"{self.name}: row {address + 1}", self.read(address)

    def read(self, address: int) -> Any:
        """The content of the row there."""
        try:
            return _named({name: _plain(value) for name, value in self._source[address].items()}, self._names)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.name}: row {address + 1} cannot be read ({brief(error)})") from None


def _split_of(source: str, name: str) -> tuple[str, str]:
    """The name of a dataset and its split."""
    found = SPLIT.fullmatch(name)
    if found is None:
        raise UserError(f"{source}: expected NAME:SPLIT or NAME/CONFIG:SPLIT, such as {source.partition(':')[0]}:NAME:train")
    return found[1], found[2]


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _label_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of every column that holds labels."""
    return {column: list(names) for column, feature in features.items() if (names := getattr(feature, "names", None))}


def _named(row: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """A row with labels by their names; one that is not known, told by a number below 0, is absent."""
    for column in names.keys() & row.keys():
        label = row.pop(column)
        if label >= 0:
            row[column] = names[column][label]
    return row


def _plain(value: Any) -> Any:
    """Texts and numbers of Python out of bytes and of arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
