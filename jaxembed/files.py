"""Small files: read with one line on what is off, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError


def cache_dir() -> Path:
    """Return the folder of everything that is computed once: extracted data, row indexes, compiled programs, encoded vectors.

    It is $JAXEMBED_CACHE if set, else ~/.cache/jaxembed.
    """
    return Path(os.environ.get("JAXEMBED_CACHE") or Path.home() / ".cache" / "jaxembed")


def exists(path: Path) -> bool:
    """Whether a file or folder is there; `UserError` where the system does not tell, as of too long a name."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path}: cannot be looked up ({error.strerror})") from None


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a name that no file can have
        raise UserError(f"{path!r}: cannot be read ({error})") from None


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode(content: bytes, where: str) -> str:
    """UTF-8 text, without a byte order mark; `where` is the file and, of one of its lines, the line, for errors."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 (byte {error.start}); save the file as UTF-8") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    return decode(read_bytes(path), str(path))


def read_json_value(path: Path) -> Any:
    """Whatever JSON a file holds."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside the file's to write to, moved there at the end: a reader, or a kill, never meets half of it."""
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises the `OSError` that `written_whole` would meet."""
    partial = _partial(path)
    there = partial.exists()
    partial.touch()
    if not there:
        partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
