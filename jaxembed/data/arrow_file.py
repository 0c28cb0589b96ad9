"""Arrow files as the library `datasets` writes them, read without a memory map.

The format is that of an Arrow stream (https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format): a
schema, then messages of a batch of rows each. A message has a header, whose metadata is a flatbuffer, and a body:

    0xFFFFFFFF | length of the metadata | metadata | body

Opening a file reads only the headers. A batch is read when one of its rows is needed.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxembed.data.columnar import import_data_extra
from jaxembed.data.table_file import TableFile
from jaxembed.errors import UserError, summarize

MESSAGE_PREFIX = struct.Struct("<iI")  # marker and length of the metadata; a length of 0 ends the stream
MESSAGE_MARKER = -1
SCHEMA_KIND, BATCH_KIND = 1, 3  # kinds of messages
# Indices of fields in the flatbuffer tables Message and RecordBatch (format/Message.fbs).
KIND_FIELD, HEADER_FIELD, BODY_LENGTH_FIELD = 1, 2, 3
ROW_COUNT_FIELD = 0


class ArrowBatch(NamedTuple):
    """The offset of a batch of rows in a file, in bytes, and its number of rows."""

    start: int
    rows: int


class ArrowFile(TableFile):
    """An Arrow stream in a file. An address is the number of a row, from 0."""

    def __init__(self, path: Path):
        """Read the schema and the headers of all batches."""
        arrow, self._ipc = (import_data_extra(module, "Arrow files") for module in ("pyarrow", "pyarrow.ipc"))
        read_errors = (OSError, UnicodeDecodeError, EOFError, arrow.ArrowException)
        try:
            self._file = arrow.OSFile(str(path))
            self._schema = self._ipc.read_schema(self._file)
            with path.open("rb") as file:
                self._batches = _list_batches(file)
        except (*read_errors, ValueError, struct.error) as error:
            raise UserError(f"{path}: cannot be read as a complete Arrow stream ({summarize(error)})") from None
        super().__init__(path, self._schema.names, [batch.rows for batch in self._batches], read_errors)

    def _read_group(self, group: int) -> Any:
        start, rows = self._batches[group]
        self._file.seek(start)
        batch = self._ipc.read_record_batch(self._ipc.read_message(self._file), self._schema)
        if len(batch) != rows:
            raise OSError(f"a batch has {len(batch)} rows instead of {rows}")
        return batch


def _list_batches(file: IO[bytes]) -> list[ArrowBatch]:
    """Return the batches of an Arrow stream.

    Raises:
        ValueError: The stream is incomplete, or has dictionary-encoded columns.
        struct.error: The stream is incomplete.
    """
    batches: list[ArrowBatch] = []
    size, start = file.seek(0, 2), 0
    while True:
        file.seek(start)
        marker, length = MESSAGE_PREFIX.unpack(file.read(MESSAGE_PREFIX.size))
        if marker != MESSAGE_MARKER:
            raise ValueError(f"no message starts at byte {start:,}")
        if not length:
            return batches
        metadata = file.read(length)
        message = _FlatTable.root(metadata)
        if (kind := message.number("<B", KIND_FIELD)) == BATCH_KIND:
            batches.append(ArrowBatch(start, message.table(HEADER_FIELD).number("<q", ROW_COUNT_FIELD)))
        elif kind != SCHEMA_KIND:
            raise ValueError("it has dictionary-encoded columns")
        end = start + MESSAGE_PREFIX.size + length + message.number("<q", BODY_LENGTH_FIELD)
        if not start < end <= size:
            raise ValueError(f"it ends at byte {size:,}, within a batch that ends at byte {end:,}")
        start = end


class _FlatTable(NamedTuple):
    """A table of a flatbuffer: the buffer, and the position of the table in it."""

    buffer: bytes
    position: int

    @classmethod
    def root(cls, buffer: bytes) -> _FlatTable:
        """Return the table at the root of a buffer."""
        return cls(buffer, *struct.unpack_from("<I", buffer))

    def number(self, layout: str, field: int) -> int:
        """Return a number, 0 if the field is absent, as flatbuffers leave out zeros."""
        offset = self._find(field)
        return int(struct.unpack_from(layout, self.buffer, self.position + offset)[0]) if offset else 0

    def table(self, field: int) -> _FlatTable:
        """Return the table that a field refers to."""
        start = self.position + self._find(field)
        return _FlatTable(self.buffer, start + struct.unpack_from("<I", self.buffer, start)[0])

    def _find(self, field: int) -> int:
        """Return the offset of a field from the table's position, 0 if it is absent."""
        vtable = self.position - struct.unpack_from("<i", self.buffer, self.position)[0]
        entry = 4 + 2 * field  # after the sizes of the vtable and of the table
        if entry >= struct.unpack_from("<H", self.buffer, vtable)[0]:
            return 0
        return int(struct.unpack_from("<H", self.buffer, vtable + entry)[0])
