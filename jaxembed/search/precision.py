"""Quantize vectors to int8 and uint8 by ranges, or to packed sign bits. Equal to sentence-transformers bit for bit."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jaxembed.errors import UserError, summarize
from jaxembed.files import exists, expand_home

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
RANGES_FILE = "quantization_ranges.npy"  # in the folder of a model
BYTE_VALUES = 256


def needs_ranges(precision: Precision) -> bool:
    """Return whether a precision maps each dimension to a byte by its range."""
    return precision in ("int8", "uint8")


def get_quantized_layout(precision: Precision, width: int) -> tuple[np.dtype, int]:
    """Return the dtype and the number of columns of quantized vectors, given their width before quantization."""
    dtype = np.dtype({"float32": "<f4", "uint8": "u1", "ubinary": "u1"}.get(precision, "i1"))
    return dtype, -(-width // 8) if precision.endswith("binary") else width


def quantize_vectors(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """Quantize vectors, as `quantize_embeddings` of sentence-transformers does.

    Args:
        vectors: float32 [N, W].
        precision: int8 and uint8 divide the range of each dimension into 255 steps, whose ends have the levels 0 to 255. binary
            and ubinary pack the signs of 8 dimensions into a byte, from which binary subtracts 128.
        ranges: Lowest and highest value of each dimension, float32 [2, W], for int8 and uint8. Values outside are clipped.

    Returns:
        An array [N, columns] as `get_quantized_layout` describes it.
    """
    if precision == "float32":
        return vectors
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - BYTE_VALUES // 2).astype(np.int8)
    assert ranges is not None
    levels = np.clip(np.floor((vectors - ranges[0]) / compute_steps(ranges)), 0, BYTE_VALUES - 1)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - BYTE_VALUES // 2).astype(np.int8)


def compute_steps(ranges: np.ndarray) -> np.ndarray:
    """Return the quantization step of each dimension, [W]; 1 for a dimension that is constant."""
    steps = (ranges[1] - ranges[0]) / (BYTE_VALUES - 1)
    return np.asarray(np.where(steps == 0, 1, steps))


def simulate_quantization(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """Quantize vectors and return float32 unit vectors [N, W] whose dot products are the cosines of the quantized vectors.

    For int8 these are the cosines of the integers, and uint8 (int8 plus 128) has the same. For binary and ubinary they are the
    cosines of the signs, 1 - 2 h / W for a Hamming distance of h.

    Args:
        vectors: Unit vectors, float32 [N, W].
        precision: The precision.
        ranges: Ranges for int8 and uint8, float32 [2, W].
    """
    if precision == "float32":
        return vectors
    if precision.endswith("binary"):
        return np.where(vectors > 0, 1, -1).astype(np.float32) / np.float32(np.sqrt(vectors.shape[1]))
    numbers = quantize_vectors(vectors, "int8", ranges).astype(np.float32)
    return numbers / np.maximum(np.linalg.norm(numbers, axis=1, keepdims=True), 1e-12)


def find_ranges(precisions: Iterable[Precision], model: str, option: str | None) -> Path | None:
    """Return the file of ranges for --precision: --ranges, or the one in the folder MODEL. None: no ranges are needed.

    Args:
        precisions: Values of --precision.
        model: MODEL.
        option: Value of --ranges.

    Raises:
        UserError: There is no such file, or --ranges is given for precisions without ranges.
    """
    names = list(precisions) or ["float32"]
    if not any(map(needs_ranges, names)):
        if option:
            raise UserError(f"--ranges: is for --precision int8 and uint8 (found {', '.join(names)}). Remove it.")
        return None
    default_path = expand_home(model) / RANGES_FILE
    if not option and not exists(default_path):
        precision = next(filter(needs_ranges, names))
        raise UserError(
            f"--precision {precision}: needs ranges (found neither --ranges nor {default_path}). Encode texts like yours with "
            f"--write-ranges {default_path} first."
        )
    return Path(option) if option else default_path


def merge_ranges(ranges: np.ndarray | None, vectors: np.ndarray) -> np.ndarray:
    """Return earlier ranges [2, W], or None, extended by the ranges of more vectors [N, W], N > 0."""
    new_ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)
    if ranges is None:
        return new_ranges
    return np.stack([np.minimum(ranges[0], new_ranges[0]), np.maximum(ranges[1], new_ranges[1])])


def read_array(path: Path, subject: str) -> np.ndarray:
    """Return the array in a .npy file, or raise `UserError` that starts with `subject`."""
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{subject}: not a .npy file ({summarize(error)}). Write one with jaxembed encode.") from None
    if not isinstance(array, np.ndarray):  # np.load opens archives too
        raise UserError(f"{subject}: not a .npy file (found an archive of arrays). Write one with jaxembed encode.")
    return array


def read_ranges(path: Path, width: int) -> np.ndarray:
    """Read the ranges [2, width] in a .npy file.

    Raises:
        UserError: The file is missing, or does not hold ranges of this width.
    """
    if not exists(path):
        raise UserError(f"{path}: no such file of ranges. Write one: python -m jaxembed.encode ... --write-ranges {path.name}")
    ranges = read_array(path, str(path))
    if ranges.shape != (2, width) or ranges.dtype.kind != "f" or not np.isfinite(ranges).all() or (ranges[0] > ranges[1]).any():
        layout = f"{ranges.dtype} {list(ranges.shape)}"
        raise UserError(
            f"{path}: not the ranges of these vectors (found {layout}; expected finite floats [2, {width}], the lowest values "
            "first). Write ranges with the same model, prompt and --dim."
        )
    return ranges.astype(np.float32)


class Quantizer:
    """Quantizes vectors batch by batch, and measures their ranges.

    Attributes:
        measured_ranges: Lowest and highest value of each dimension so far, [2, width]. None before the first vectors.
    """

    def __init__(self, precision: Precision, ranges: np.ndarray | None):
        """Set the precision and its `ranges`, which only int8 and uint8 need."""
        self._precision, self._ranges = precision, ranges
        self.measured_ranges: np.ndarray | None = None

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Return quantized vectors."""
        self.measured_ranges = merge_ranges(self.measured_ranges, vectors)
        return quantize_vectors(vectors, self._precision, self._ranges)
