"""Small files: one-line errors on reading, and atomic writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
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
    """Return whether a file or folder exists. Raises `UserError` if the system cannot tell, as for a name that is too long."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path}: cannot be accessed ({error.strerror})") from None


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, or raise `UserError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a name that no file can have
        raise UserError(f"{path}: cannot be read ({error})") from None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode(content: bytes, where: str) -> str:
    """Decode UTF-8 and drop a byte order mark.

    Args:
        content: The bytes of a file or of one of its lines.
        where: The file, or file and line, which starts an error's line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 (byte {error.start}). Save the file as UTF-8.") from None


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or raise `UserError`."""
    return decode(read_bytes(path), str(path))


def read_json_value(path: Path) -> Any:
    """Return the JSON value in a file, or raise `UserError`."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise `UserError`."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. Numbers that are not finite become null."""
    write_text(path, format_json(value, indent=2) + "\n")


def format_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_replace_not_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _replace_not_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_not_finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_not_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and move it there at the end.

    Neither a reader nor a kill ever leaves half a file at `path`.
    """
    partial = _partial_path(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise the `OSError` that `atomic_write` would meet."""
    partial = _partial_path(path)
    existed = partial.exists()
    partial.touch()
    if not existed:
        partial.unlink()


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
