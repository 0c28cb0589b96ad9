"""Rows of tables: Parquet files, Hugging Face datasets, TensorFlow Datasets."""

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

from jaxembed.errors import UserError, summarize

MAX_DECODED_BYTES = 256 * 2**20  # of decoded row groups that stay in memory, per file
ROWS_PER_READ = 1024  # of a scan
DATASET_SPLIT = re.compile(r"(.+?):([\w.-]+(?:\[.*\])?(?:\+.*)?)")  # a split may be a slice (train[:10%]) or a sum of several
log = logging.getLogger(__name__)


def import_data_extra(module: str, feature: str) -> Any:
    """Import a module of the optional dependencies `data`.

    Args:
        module: Full name of the module.
        feature: What needs it, a plural that starts the error.

    Raises:
        UserError: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{feature} need the package {package}. Install it with: pip install '.[data]'") from None


class ParquetFile:
    """A Parquet file. An address is the number of a row, from 0.

    Reading one row decodes its whole row group. The most recently used groups stay in memory, up to
    `MAX_DECODED_BYTES`. If the groups of a file are larger than that together, random reads are slow, and a warning says so.
    """

    def __init__(self, path: Path):
        """Read the metadata of the file."""
        parquet, arrow = (import_data_extra(module, "Parquet files") for module in ("pyarrow.parquet", "pyarrow"))
        self.name = str(path)
        self._lock, self._decoded_groups = threading.Lock(), OrderedDict[int, Any]()
        self._read_errors = (OSError, UnicodeDecodeError, arrow.ArrowException)
        try:
            self._file = parquet.ParquetFile(path)  # no memory map: a truncated file is an error, not a SIGBUS
            self.columns = list(self._file.schema_arrow.names)
        except self._read_errors as error:
            raise UserError(f"{path}: not a complete Parquet file ({summarize(error)})") from None
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.address_limit = metadata.num_rows
        self._group_ends = list(accumulate(group.num_rows for group in groups))
        if len(groups) > 1 and sum(group.total_byte_size for group in groups) > MAX_DECODED_BYTES:
            log.warning(
                "%s: random reads will be slow, because each one decodes one of %s large row groups. Convert the file once to "
                "train faster: python -m jaxembed.data convert",
                path, f"{len(groups):,}",
            )  # fmt: skip

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, file and row number, and content of every row."""
        address = 0
        try:
            for batch in self._file.iter_batches(ROWS_PER_READ):
                for row in batch.to_pylist():
                    yield address, f"{self.name}: row {address + 1}", row
                    address += 1
        except self._read_errors as error:
            raise self._damage_error(address, error) from None

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        group = bisect_right(self._group_ends, address)
        start = self._group_ends[group - 1] if group else 0
        try:
            with self._lock:
                row = self._decode_group(group).slice(address - start, 1)
            return row.to_pylist()[0]
        except self._read_errors as error:
            raise self._damage_error(address, error) from None

    def _decode_group(self, group: int) -> Any:
        """Return a decoded row group, and drop the least recently used ones beyond `MAX_DECODED_BYTES`."""
        decoded = self._decoded_groups
        if group not in decoded:
            decoded[group] = self._file.read_row_group(group)
            while len(decoded) > 1 and sum(table.nbytes for table in decoded.values()) > MAX_DECODED_BYTES:
                decoded.popitem(last=False)
        decoded.move_to_end(group)
        return decoded[group]

    def _damage_error(self, address: int, error: Exception) -> UserError:
        return UserError(f"{self.name}: row {address + 1} or a later row is damaged ({summarize(error)})")


class HubDataset:
    """One split of a Hugging Face dataset, with class labels as their names. An address is the number of a row, from 0."""

    def __init__(self, name: str, dataset: Any):
        """Wrap a loaded `datasets.Dataset`; `name` appears in errors."""
        self.name, self.address_limit = name, len(dataset)
        self.files = [Path(part["filename"]) for part in dataset.cache_files]
        self._dataset = dataset.with_format(None)  # a stored format, such as numpy, would change the types of the values
        self._class_names = _get_class_names(dataset.features)

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, dataset and row number, and content of every row."""
        for address, row in enumerate(self._dataset):
            yield address, f"{self.name}: row {address + 1}", self._convert_row(row)

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        return self._convert_row(self._dataset[address])

    def _convert_row(self, row: Mapping[str, Any]) -> Any:
        return _name_classes(dict(row), self._class_names)


def load_hub_dataset(name: str) -> HubDataset:
    """Load the dataset NAME:SPLIT or NAME/CONFIG:SPLIT from the Hugging Face cache, the hub or a local folder."""
    datasets = import_data_extra("datasets", "Hugging Face datasets")
    repository, split = _parse_dataset_name(f"hf:{name}", name)
    parts, config = repository.split("/"), None
    if len(parts) == 3 and parts[0] not in ("", ".", ".."):  # ORG/NAME/CONFIG, not the path of a folder
        repository, config = "/".join(parts[:2]), parts[2]
    try:
        dataset = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"hf:{name}: cannot be loaded ({summarize(error)})") from None
    return HubDataset(f"hf:{name}", dataset)


def load_saved_dataset(folder: Path) -> HubDataset:
    """Load the dataset that `Dataset.save_to_disk` wrote to a folder."""
    datasets = import_data_extra("datasets", "Hugging Face datasets")
    try:
        return HubDataset(str(folder), datasets.Dataset.load_from_disk(str(folder)))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not a complete saved dataset ({summarize(error)})") from None


class TfDataset:
    """One split of a TensorFlow Dataset, read without TensorFlow. An address is the number of an example, from 0."""

    def __init__(self, name: str):
        """Open NAME:SPLIT or NAME/CONFIG:SPLIT, which `tfds build` wrote to $TFDS_DATA_DIR or ~/tensorflow_datasets."""
        tfds = import_data_extra("tensorflow_datasets", "TensorFlow Datasets")
        self.name = f"tfds:{name}"
        dataset, split = _parse_dataset_name(self.name, name)
        try:
            self._source = tfds.core.read_only_builder.builder_from_files(dataset).as_data_source(split=split)
        except tfds.core.DatasetNotFoundError:
            raise UserError(
                f"{self.name}: no such dataset in {tfds.core.constants.DATA_DIR}. Create it with "
                f"`tfds build {dataset} --file_format=array_record`, or set TFDS_DATA_DIR to the folder that contains it."
            ) from None
        except (OSError, ValueError, KeyError, ImportError, AssertionError, NotImplementedError) as error:
            raise UserError(f"{self.name}: cannot be loaded ({summarize(error)})") from None
        info = self._source.dataset_info
        self.address_limit = len(self._source)
        self.files = [Path(path) for path in info.splits[split].filepaths]
        self._class_names = _get_class_names(info.features)

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, dataset and row number, and content of every row."""
        for address in range(self.address_limit):
            yield address, f"{self.name}: row {address + 1}", self.read(address)

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        try:
            row = {name: _to_python(value) for name, value in self._source[address].items()}
            return _name_classes(row, self._class_names)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.name}: row {address + 1} cannot be read ({summarize(error)})") from None


def _parse_dataset_name(source: str, name: str) -> tuple[str, str]:
    """Split NAME:SPLIT into its two parts."""
    match = DATASET_SPLIT.fullmatch(name)
    if match is None:
        raise UserError(f"{source}: expected NAME:SPLIT or NAME/CONFIG:SPLIT, such as {source.partition(':')[0]}:NAME:train")
    return match[1], match[2]


def _get_class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the class names of every column that holds class labels."""
    return {column: list(names) for column, feature in features.items() if (names := getattr(feature, "names", None))}


def _name_classes(row: dict[str, Any], class_names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Replace class numbers by their names, in place. A negative number means no label and becomes None."""
    for column in class_names.keys() & row.keys():
        label = row[column]
        row[column] = None if label is None or label < 0 else class_names[column][label]
    return row


def _to_python(value: Any) -> Any:
    """Convert bytes to str, and NumPy arrays and scalars to lists and numbers."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return [_to_python(item) for item in value]
    return _to_python(value.tolist()) if hasattr(value, "tolist") else value
