"""Build a folder beside its final place, and leave nothing behind if that fails or the process is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from jaxembed.errors import UserError, summarize

SCRATCH_PREFIX = ".export-"  # of the name of a temporary folder
SCRATCH_LOCK_FILE = "lock"  # locked while the process that writes the folder runs
MAX_UNLOCKED_AGE_S = 24 * 3600  # of a folder without a lock file, as earlier versions wrote it; older ones are removed


@contextlib.contextmanager
def open_scratch_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside an output, and remove it at the end. The folder of the output is created if needed.

    Folders that killed processes left there are removed first. Commands turn SIGTERM and Ctrl-C into exceptions, so that they
    remove their folder themselves.

    Args:
        out: The output, which is written by moving a part of the temporary folder there.

    Raises:
        UserError: A file could not be written, for example because the disk is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_folders(out.parent)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=SCRATCH_PREFIX))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Name another output.") from None
    try:
        with (folder / SCRATCH_LOCK_FILE).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else summarize(error)
        raise UserError(f"{out}: not written ({reason}). Free space on its disk, or name another output.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, out: Path) -> None:
    """Move a finished folder to its place. Its files get the permissions that new files have (umask).

    safetensors and onnx write private files, but a server that runs as another user must be able to read them.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
    folder.rename(out)  # fails if another process has written there meanwhile


def _remove_stale_folders(parent: Path) -> None:
    """Remove the temporary folders of processes that have ended."""
    for folder in parent.glob(f"{SCRATCH_PREFIX}*"):
        # A folder may vanish, or belong to another user.
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.is_symlink() and _is_stale(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    """Return whether the process that wrote a temporary folder has ended."""
    lock_path = folder / SCRATCH_LOCK_FILE
    if not lock_path.exists():
        return time.time() - folder.stat().st_mtime > MAX_UNLOCKED_AGE_S
    with lock_path.open("a") as lock:
        return _try_lock(lock)


def _try_lock(file: IO[str]) -> bool:
    """Return whether no living process holds the lock of a file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
