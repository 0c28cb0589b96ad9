"""Files of vectors (.npy), written one part after the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from jaxembed.errors import UserError

FLOAT32 = np.dtype("<f4")


def write_vectors(
    partial: Path, out: Path, parts: Iterable[np.ndarray], width: int, count: int | None, dtype: np.dtype = FLOAT32
) -> int:
    """Write vectors to a .npy file, one part after the other, and return their number.

    The file is not memory-mapped, so a full disk raises an error instead of SIGBUS.

    Args:
        partial: The file to write.
        out: Name of the file in errors.
        parts: Vectors [n, width] each.
        width: Width of the vectors.
        count: Expected number of vectors, for the progress bar. None: unknown.
        dtype: Dtype of the file.

    Raises:
        UserError: The file cannot be written.
    """
    num_written = 0
    try:
        with partial.open("wb") as file, tqdm(total=count, unit="text") as bar:
            # The header has a fixed length, and is written again when the number of vectors is known.
            write_header(file, (0, width), dtype)
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).tobytes())
                num_written += len(part)
                bar.update(len(part))
            file.seek(0)
            write_header(file, (num_written, width), dtype)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Free space, or name another output.") from None
    return num_written


def write_header(file: IO[bytes], shape: tuple[int, int], dtype: np.dtype = FLOAT32) -> None:
    """Write the header of a .npy file, which has the same length for every shape."""
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})


def check_disk_space(out: Path, needed_bytes: int) -> None:
    """Raise `UserError` if an output of this many bytes does not fit on its disk.

    Without this check a full disk would be noticed only while writing.
    """
    free = shutil.disk_usage(out.parent).free
    if needed_bytes > free:
        raise UserError(
            f"{out}: needs {needed_bytes / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB left. Free space, or name "
            "another output."
        )
