"""Handle standard output and standard error that cannot be written: a closed pipe, a closed terminal, a full disk.

Progress and logs must never end a command, so text that standard error cannot take is dropped (`LossyStream`). The result on
standard output must not be lost silently, so a failure there ends the command with a separate exception (`CheckedStream`): an
`OSError` would look like an error of one of the command's files.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class StandardOutputError(Exception):
    """Standard output cannot be written. `errno` is that of the `OSError`."""

    def __init__(self, error: OSError):
        super().__init__(error.strerror)
        self.errno = error.errno


class LossyStream:
    """A text stream that drops what cannot be written. None stands for a stream that was never open."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text if possible. Return its length."""
        try:
            if self._stream is not None:
                self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            pass

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class CheckedStream:
    """A text stream that raises `StandardOutputError` if it cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise StandardOutputError(error) from None

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            raise StandardOutputError(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_standard_streams() -> None:
    """Replace `sys.stderr` by a lossy stream and `sys.stdout` by a checked one.

    Characters that the encoding of standard output lacks are escaped, as Python does on standard error.

    A standard stream that is closed gets the null device as its descriptor. Otherwise the next file that is opened would get
    its number, and messages of C libraries would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
    if not isinstance(sys.stderr, LossyStream):
        sys.stderr = LossyStream(sys.stderr)
    if sys.stdout is not None and not isinstance(sys.stdout, CheckedStream):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout = CheckedStream(sys.stdout)
