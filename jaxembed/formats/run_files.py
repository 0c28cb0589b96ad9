"""Names of the files in a run directory, and a reader for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxembed.errors import UserError

T = TypeVar("T")

BASE_RECORD_FILE = "base.json"  # describes the base of a run; a folder with this file is a run
DATA_REPORT_FILE = "data.json"  # sizes, shares and lengths of the sources of each stage
LOGGERS_FILE = "loggers.json"  # the id of the run in each logger
STARTS_FILE = "starts.jsonl"  # one line per start: time, command, devices, parameters
TOKENIZER_FOLDER = "tokenizer"


def name_merged_adapters(run_dir: Path, stage: int) -> Path:
    """Return the PEFT folder of the adapters that were merged into the base before a stage."""
    return run_dir / "merged" / f"stage-{stage}"


def name_mined_pairs(run_dir: Path, stage: int, source: int) -> Path:
    """Return the path of the pairs that a run mined for a source of a stage, both given by their index."""
    return run_dir / "mined" / f"stage-{stage}-source-{source}.jsonl"


def read_run_file(read: Callable[[Path], T], path: Path, alternative: str = "name another run.dir") -> T:
    """Read a file that a run has written.

    Args:
        read: Reads the file.
        path: The file.
        alternative: Alternative to restoring the file, for the error.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return read(path)
    except UserError as error:
        problem = str(error).removesuffix(".")
        raise UserError(f"{problem}. This file of the run is damaged: restore it, or {alternative}.") from None
