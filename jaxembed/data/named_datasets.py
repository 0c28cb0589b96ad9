"""Open datasets of other libraries by name and split: Hugging Face datasets and TensorFlow Datasets."""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from jaxembed.config.fields import Fields
from jaxembed.data.arrow_file import ArrowFile
from jaxembed.data.columnar import import_data_extra
from jaxembed.data.file_set import FileSet
from jaxembed.errors import UserError, summarize
from jaxembed.files import exists, read_json

DATASET_SPLIT = re.compile(r"(.+?):([\w.-]+(?:\[.*\])?(?:\+.*)?)")  # a split may be a slice (train[:10%]) or a sum of several
STATE_FILE = "state.json"  # written by `Dataset.save_to_disk`, with the names of the data files
INFO_FILE = "dataset_info.json"  # written next to it, with the types of the columns
SPLITS_FILE = "dataset_dict.json"  # written by `DatasetDict.save_to_disk`, with the names of the splits


class HubDataset:
    """One split of a Hugging Face dataset, with class labels as their names. An address is the number of a row, from 0."""

    def __init__(self, name: str, files: list[Path], rows: Any, class_names: Mapping[str, list[str]]):
        """Wrap the rows of a dataset.

        Args:
            name: Name for errors.
            files: Files of the rows.
            rows: A `FileSet`, or `LibraryRows`.
            class_names: Names of the classes, for every column that holds class labels.
        """
        self.name, self.address_limit, self.files = name, rows.address_limit, files
        self._rows, self._class_names = rows, class_names

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, dataset and row number, and content of every row."""
        for address, _, row in self._rows.scan():
            yield address, self.locate(address), _name_classes(row, self._class_names)

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        return _name_classes(self._rows.read(address), self._class_names)

    def locate(self, address: int) -> str:
        """Return dataset and row number of the row at an address, for errors."""
        return f"{self.name}: row {address + 1}"


class LibraryRows:
    """The rows of a `datasets.Dataset` as the library reads them: through a memory map."""

    def __init__(self, dataset: Any):
        self._dataset, self.address_limit = dataset, len(dataset)

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, no location, and content of every row."""
        return ((address, "", dict(row)) for address, row in enumerate(self._dataset))

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        return dict(self._dataset[address])


class RowRanges:
    """Ranges of the rows of several files, one after the other. An address counts through all ranges."""

    def __init__(self, ranges: Sequence[tuple[FileSet, int, int]]):
        """Join ranges, each given by its files, the address of its first row, and the address after its last row."""
        self._ranges, self._ends = ranges, list(accumulate(end - first for _, first, end in ranges))
        self.address_limit = self._ends[-1]

    def scan(self) -> Iterator[tuple[int, str, Any]]:
        """Yield address, location and content of every row."""
        scans = (islice(rows.scan(), first, end) for rows, first, end in self._ranges)
        return ((address, where, row) for address, (_, where, row) in enumerate(chain.from_iterable(scans)))

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        index = bisect_right(self._ends, address)
        rows, _, end = self._ranges[index]
        return rows.read(end - (self._ends[index] - address))


def load_hub_dataset(name: str) -> HubDataset:
    """Load the dataset NAME:SPLIT or ORG/NAME/CONFIG:SPLIT from the Hugging Face cache, the hub or a local folder.

    Splits and slices of them are read from their Arrow files. A dataset without files is read by the library.
    """
    datasets = import_data_extra("datasets", "Hugging Face datasets")
    repository, split = _parse_dataset_name(f"hf:{name}", name)
    parts, config = repository.split("/"), None
    if len(parts) == 3 and parts[0] not in ("", ".", ".."):  # ORG/NAME/CONFIG, not the path of a folder
        repository, config = "/".join(parts[:2]), parts[2]
    try:
        dataset = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"hf:{name}: cannot be loaded ({summarize(error)})") from None
    # Read the rows from the Arrow files, if these hold exactly the rows of the split.
    files = [Path(part["filename"]) for part in dataset.cache_files]
    rows: Any = FileSet(f"hf:{name}", files, ArrowFile) if files else None
    # If not, the split may be a slice, or a sum of slices.
    if rows is not None and rows.address_limit != len(dataset):
        rows = _open_slices(
            f"hf:{name}", dataset.info.splits, split, functools.partial(datasets.load_dataset, repository, config)
        )
    # Anything else is left to the library.
    if rows is None or rows.address_limit != len(dataset):
        rows = LibraryRows(dataset.with_format(None))  # a stored format, such as numpy, would change the types of the values
    return HubDataset(f"hf:{name}", files, rows, _get_class_names(dataset.features))


def _open_slices(name: str, splits: Mapping[str, Any], split: str, load: Callable[..., Any]) -> RowRanges:
    """Return the rows of a split such as train[:10%]+test. `load` loads the whole split that its argument names."""
    from datasets import ReadInstruction

    parts = ReadInstruction.from_spec(split).to_absolute({key: info.num_examples for key, info in splits.items()})
    files = {part.splitname: [Path(file["filename"]) for file in load(split=part.splitname).cache_files] for part in parts}
    file_sets = {key: FileSet(name, paths, ArrowFile) for key, paths in files.items()}
    return RowRanges([(file_sets[part.splitname], part.from_, part.to) for part in parts])


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote a folder."""
    return exists(folder / STATE_FILE)


def list_saved_splits(folder: Path) -> list[str]:
    """Return the splits of a folder that `DatasetDict.save_to_disk` wrote; empty for any other folder."""
    path = folder / SPLITS_FILE
    if not exists(path):
        return []
    splits = read_json(path).get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise UserError(f"{path}: damaged (expected a list of names in splits). Save the dataset again.")
    return splits


def load_saved_dataset(folder: Path) -> HubDataset:
    """Open the dataset that `Dataset.save_to_disk` wrote to a folder, without the library."""
    import_data_extra("pyarrow", "Hugging Face datasets")
    state, where = read_json(folder / STATE_FILE), str(folder / STATE_FILE)
    names = [Fields(entry, where).string("filename") for entry in state.get("_data_files") or ()]
    is_outside = any(Path(name).name != name for name in names)  # the library writes all files into the folder
    if not names or is_outside or state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder}: not a complete saved dataset (no data files, or an old format). Save it again.")
    features = read_json(folder / INFO_FILE).get("features") if exists(folder / INFO_FILE) else None
    files = [folder / name for name in names]
    return HubDataset(str(folder), files, FileSet(str(folder), files, ArrowFile), _read_class_names(features or {}))


def _read_class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the class names of every column that holds class labels, given the types of a dataset_info.json."""
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


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
            yield address, self.locate(address), self.read(address)

    def read(self, address: int) -> Any:
        """Return the content of the row at an address."""
        try:
            row = {name: _to_python(value) for name, value in self._source[address].items()}
            return _name_classes(row, self._class_names)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.locate(address)} cannot be read ({summarize(error)})") from None

    def locate(self, address: int) -> str:
        """Return dataset and row number of the row at an address, for errors."""
        return f"{self.name}: row {address + 1}"


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
