"""Small files: one-line errors on reading, and atomic writes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character that UTF-16 writes as two; no Unicode text has one alone


def cache_dir() -> Path:
    """Return the cache folder, for extracted data, row indexes, compiled programs and encoded vectors.

    It is $JAXEMBED_CACHE if set, otherwise ~/.cache/jaxembed. Without a writable home directory, it is a private folder in the
    system's temporary directory.

    Raises:
        UserError: The temporary folder is needed, but cannot be used.
    """
    if folder := os.environ.get("JAXEMBED_CACHE"):
        return Path(folder)
    try:
        default = Path.home() / ".cache" / "jaxembed"
        default.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(default, os.W_OK | os.X_OK):
            return default
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        pass
    fallback = Path(tempfile.gettempdir()) / f"jaxembed-{os.geteuid()}"
    try:
        return make_private_folder(fallback)
    except OSError as error:
        raise UserError(f"{fallback}: cannot be created ({error.strerror}). Set JAXEMBED_CACHE to a folder.") from None


def expand_home(name: str | Path) -> Path:
    """Return a path with the home folder in place of a leading ~."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # the home folder of an unknown user
        return Path(name)


def make_private_folder(path: Path) -> Path:
    """Create a folder that only its owner can read and write, whatever the umask, and return its path.

    Raises:
        UserError: The folder exists and belongs to another user, who could change what this one reads.
        OSError: The folder cannot be created.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode) or (info.st_uid != os.geteuid() and info.st_uid != _find_owner_of_new_files(path)):
        raise UserError(f"{path}: belongs to another user, or is a link. Remove it, or set JAXEMBED_CACHE to another folder.")
    if stat.S_IMODE(info.st_mode) & 0o077:
        path.chmod(0o700)
    return path


def _find_owner_of_new_files(folder: Path) -> int:
    """Return the owner of files that this process creates in a folder. A network disk may map users to others."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


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


def compute_file_digest(path: Path) -> str:
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
        raise UserError(f"{path}: holds a {type(value).__name__} (expected a JSON object)")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. Numbers that are not finite become null."""
    write_text(path, format_json(value, indent=2) + "\n")


def format_json(value: Any, indent: int | None = None, is_ascii: bool = False) -> str:
    """Return a value as JSON that UTF-8 can encode.

    NaN and infinity, which JSON does not have, become null. Bytes of a file name that are not UTF-8, which Python reads as
    halves of surrogate pairs, are escaped.
    """
    text = json.dumps(_replace_not_finite(value), indent=indent, ensure_ascii=is_ascii, allow_nan=False)
    return SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def finite_or_none(value: float) -> float | None:
    """Return a number, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _replace_not_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_not_finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_not_finite(entry) for entry in value]
    return finite_or_none(value) if isinstance(value, float) else value


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Halves of surrogate pairs, such as file names may have, become question marks."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


@contextmanager
def lock_folder(folder: Path, subject: Path) -> Iterator[None]:
    """Lock a folder inside the block against other processes of this machine.

    Args:
        folder: The folder, which exists.
        subject: The output that the error names.

    Raises:
        UserError: Another process has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{subject}: another process is writing it. Wait for that process, or name another output.") from None
    except OSError:  # a network disk that has no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append a line to a UTF-8 file."""
    with name_in_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Give an `OSError` of the block that names no file the name of this one. A full disk is reported without a name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and move it there at the end.

    `path` never holds an incomplete file, even after a kill.
    """
    partial, descriptor = _create_partial(path)
    try:
        with name_in_errors(path):
            yield partial
            if not _is_open_file(partial, descriptor):
                raise UserError(f"{path}: another process writes this file at the same time. Name another output.")
            partial.replace(path)
    finally:
        if _is_open_file(partial, descriptor):
            partial.unlink()
        os.close(descriptor)


def make_output_folder(folder: Path, subject: str) -> None:
    """Create the folder of an output if it does not exist. The `UserError` starts with `subject`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{subject} cannot be created ({error.strerror}). Name another output.") from None


def check_writable(path: Path) -> None:
    """Raise the `OSError` that `atomic_write` would meet."""
    partial, descriptor = _create_partial(path)
    partial.unlink()
    os.close(descriptor)


def _create_partial(path: Path) -> tuple[Path, int]:
    """Create an empty file beside `path`. Return its path, and an open descriptor that identifies it.

    An existing file is removed: one of a killed process, or a link, which is not followed.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    return partial, os.open(partial, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o666)


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Return whether a path still names the file that a descriptor has open."""
    return os.path.lexists(path) and os.path.samestat(path.lstat(), os.fstat(descriptor))
