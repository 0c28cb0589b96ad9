"""Parquet files."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxembed.data import table_file
from jaxembed.data.table_file import ROWS_PER_READ, TableFile
from jaxembed.errors import UserError, summarize

log = logging.getLogger(__name__)


def import_data_extra(module: str, feature: str) -> Any:
    """Import a module of the optional dependencies `data`.

    Args:
        module: Full name of the module.
        feature: What needs it, a plural that starts the error.

    Raises:
        UserError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{feature} need the package {package}. Install it with: pip install '.[data]'") from None


class ParquetFile(TableFile):
    """A Parquet file. An address is the number of a row, from 0.

    If the row groups of a file do not fit into memory together, random reads are slow, and a warning is logged.
    """

    def __init__(self, path: Path):
        """Read the metadata of the file."""
        parquet, arrow = (import_data_extra(module, "Parquet files") for module in ("pyarrow.parquet", "pyarrow"))
        read_errors = (OSError, UnicodeDecodeError, arrow.ArrowException)
        try:
            self._file = parquet.ParquetFile(path)  # without a memory map
            columns, metadata = self._file.schema_arrow.names, self._file.metadata
        except read_errors as error:
            raise UserError(f"{path}: not a complete Parquet file ({summarize(error)})") from None
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        super().__init__(path, columns, [group.num_rows for group in groups], read_errors)
        if len(groups) > 1 and sum(group.total_byte_size for group in groups) > table_file.MAX_DECODED_BYTES:
            log.warning(
                "%s: random reads will be slow, because each one decodes one of %s large row groups. Convert the file once to "
                "train faster: python -m jaxembed.data convert",
                path, f"{len(groups):,}",
            )  # fmt: skip

    def _iter_tables(self) -> Iterator[Any]:
        return self._file.iter_batches(ROWS_PER_READ)

    def _read_group(self, group: int) -> Any:
        return self._file.read_row_group(group)
