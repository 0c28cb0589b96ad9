"""Vectors in fewer bits: int8 and uint8 by ranges, and signs packed into bits. Equal to sentence-transformers bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jaxembed.errors import UserError
from jaxembed.files import exists

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
RANGES_FILE = "quantization_ranges.npy"  # in the folder of a model
BYTE_VALUES = 256


def needs_ranges(precision: Precision) -> bool:
    """Return whether a precision maps each number to a byte by its range."""
    return precision in ("int8", "uint8")


def quantized_layout(precision: Precision, width: int) -> tuple[np.dtype, int]:
    """Return the dtype and the columns of quantized vectors of a width."""
    dtype = np.dtype({"float32": "<f4", "uint8": "u1", "ubinary": "u1"}.get(precision, "i1"))
    return dtype, -(-width // 8) if precision.endswith("binary") else width


def quantize_vectors(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """Quantize vectors, as `quantize_embeddings` of sentence-transformers does.

    Args:
        vectors: float32 [N, W].
        precision: int8 and uint8 divide the range of each number into 256 steps. binary and ubinary keep the sign of each
            number: 8 in a byte, of which binary subtracts 128.
        ranges: Lowest and highest value of each number, float32 [2, W], for int8 and uint8. Values outside are clipped.

    Returns:
        An array [N, columns] as `quantized_layout` describes it.
    """
    if precision == "float32":
        return vectors
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - BYTE_VALUES // 2).astype(np.int8)
    assert ranges is not None
    starts = ranges[0]
    steps = (ranges[1] - starts) / (BYTE_VALUES - 1)
    steps = np.where(steps == 0, 1, steps)  # a number that is always the same
    levels = np.clip(np.floor((vectors - starts) / steps), 0, BYTE_VALUES - 1)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - BYTE_VALUES // 2).astype(np.int8)


def merge_ranges(ranges: np.ndarray | None, vectors: np.ndarray) -> np.ndarray:
    """Return the ranges [2, W] of earlier vectors, None for none, extended by those of more vectors [N, W], N > 0."""
    found = np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)
    return found if ranges is None else np.stack([np.minimum(ranges[0], found[0]), np.maximum(ranges[1], found[1])])


def read_ranges(path: Path, width: int) -> np.ndarray:
    """Read the ranges [2, width] in a .npy file.

    Raises:
        UserError: The file is missing, or does not have them.
    """
    if not exists(path):
        raise UserError(f"{path}: no such file of ranges. Write one: python -m jaxembed.encode ... --write-ranges {path.name}")
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a .npy file ({error})") from None
    if ranges.shape != (2, width) or ranges.dtype.kind != "f" or not np.isfinite(ranges).all() or (ranges[0] > ranges[1]).any():
        found = f"{ranges.dtype} {list(ranges.shape)}"
        raise UserError(
            f"{path}: not the ranges of these vectors (found {found}; expected finite floats [2, {width}], the lowest values "
            "first). Write ranges with the same model, prompt and --dim."
        )
    return ranges.astype(np.float32)


class Quantizer:
    """Quantizes vectors batch by batch, and measures their ranges.

    Attributes:
        found_ranges: Lowest and highest value of each dimension so far, [2, width]. None before the first vectors.
    """

    def __init__(self, precision: Precision, ranges: np.ndarray | None):
        """Set the precision and its `ranges`, which only int8 and uint8 need."""
        self._precision, self._ranges = precision, ranges
        self.found_ranges: np.ndarray | None = None

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Return quantized vectors."""
        self.found_ranges = merge_ranges(self.found_ranges, vectors)
        return quantize_vectors(vectors, self._precision, self._ranges)
