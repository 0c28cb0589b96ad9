"""Find the int8 ranges of a run, pass them to its objectives, and record them.

Ranges are the minimum and the maximum of each dimension of the vectors. int8 quantization maps them to the ends of a byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxembed.config import Config
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, exists, expand_home
from jaxembed.hub.base import Base
from jaxembed.search.precision import RANGES_FILE, read_ranges
from jaxembed.training.stage import Stage


def open_ranges(config: Config, base: Base, width: int) -> np.ndarray | None:
    """Return the ranges of a run for int8, float32 [2, width]. None if neither its objectives nor its held-out sets need them.

    A resumed run uses the ranges that it recorded. Otherwise `quantization.ranges` names their file, or the folder of the base
    has it.

    Raises:
        UserError: There is no such file, it does not fit the vectors, or stages name different files.
    """
    trains_int8 = any("int8" in stage.quantization.precisions for stage in config.stages)
    if not trains_int8 and all(set_config.precision != "int8" for set_config in config.eval.sets):
        return None
    run_path, base_path = Path(config.run.dir) / RANGES_FILE, expand_home(base.name) / RANGES_FILE
    if exists(run_path):
        return read_ranges(run_path, width)
    configured_paths = list(dict.fromkeys(stage.quantization.ranges for stage in config.stages if stage.quantization.ranges))
    if len(configured_paths) > 1:
        found = " and ".join(configured_paths)
        raise UserError(f"quantization.ranges: differs between stages (found {found}). All stages share one file: name one.")
    if not configured_paths and not exists(base_path):
        key = "quantization.precisions" if trains_int8 else "eval.sets"
        raise UserError(
            f"{key}: int8 needs ranges (found neither quantization.ranges nor {base_path}). Write a file of them: python -m "
            f"jaxembed.encode {base.name} TEXTS OUT.npy --write-ranges RANGES.npy"
        )
    return read_ranges(Path(configured_paths[0]) if configured_paths else base_path, width)


def apply_ranges(stages: Sequence[Stage], ranges: np.ndarray | None) -> Sequence[Stage]:
    """Return the stages with `ranges` in their objectives. None: the stages are returned unchanged."""
    if ranges is None:
        return stages
    values = tuple(map(tuple, ranges.tolist()))
    return [dataclasses.replace(s, objectives=dataclasses.replace(s.objectives, ranges=values)) for s in stages]


def record_ranges(run_dir: Path, ranges: np.ndarray | None) -> None:
    """Write the ranges into the run directory, where commands look for them."""
    path = run_dir / RANGES_FILE
    if ranges is not None and not exists(path):
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, ranges)
