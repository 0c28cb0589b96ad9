"""TensorBoard event files, written in the calling thread.

A library that writes in a thread of its own would block the training loop for good once a full disk has ended that thread. Here
an error reaches the caller, and nothing large is imported. A file is a TFRecord file of `Event` protocol buffers
(tensorflow/core/util/event.proto), of which a run needs few fields.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CRC32C_POLYNOMIAL = 0x82F63B78  # of Castagnoli, bits reversed
CRC_MASK = 0xA282EAD8  # TFRecord files hold masked checksums


class EventFile:
    """A new event file in a folder. Every method raises `OSError` if it cannot be written."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        """Create the file.

        Args:
            folder: The folder, which is created if it does not exist.
            purge_step: Step of the checkpoint that a run resumes from. TensorBoard hides what earlier files have after it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write(_encode_bytes(3, b"brain.Event:2"))  # file_version
        if purge_step is not None:
            session_start = _encode_integer(1, 1)  # status: START
            self._write(_encode_integer(2, purge_step + 1) + _encode_bytes(7, session_start))
        self._file.flush()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for name, value in values.items():
            tag = re.sub(r"[^-/\w.]", "_", name).lstrip("/")
            simple_value = bytes([2 << 3 | 5]) + np.array(value, "<f4").tobytes()
            scalar = _encode_bytes(1, tag.encode()) + simple_value
            self._write(_encode_integer(2, step) + _encode_bytes(5, _encode_bytes(1, scalar)))  # step, summary.value
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        """Write an event with these fields and the time: its length and content, each with its checksum."""
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_checksum(length) + event + _masked_checksum(event))


def _encode_integer(field: int, value: int) -> bytes:
    """Encode an integer >= 0 as a field of a protocol buffer."""
    return _encode_varint(field << 3) + _encode_varint(value)


def _encode_bytes(field: int, content: bytes) -> bytes:
    """Encode a text or a message as a field of a protocol buffer."""
    return _encode_varint(field << 3 | 2) + _encode_varint(len(content)) + content


def _encode_varint(value: int) -> bytes:
    """Encode an integer in groups of seven bits, the lowest first. All groups but the last have the highest bit set."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ CRC32C_POLYNOMIAL * (byte & 1)
    return byte


CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def _masked_checksum(content: bytes) -> bytes:
    """Return the checksum of a TFRecord file: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + CRC_MASK) & 0xFFFFFFFF)
