"""Encode every line of a text file, or every row of another file, into a vector.

Usage: python -m jaxembed.encode MODEL IN OUT.npy
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from jaxembed import cli
from jaxembed.config.field_lists import log_once
from jaxembed.data.tokenize import MAX_TEXT_CHARS
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, decode, exists
from jaxembed.search.precision import (
    PRECISIONS,
    RANGES_FILE,
    Precision,
    merge_ranges,
    needs_ranges,
    quantize_vectors,
    quantized_layout,
    read_ranges,
)

FLOAT32 = np.dtype("<f4")
TEXTS_PER_BATCH, CHARS_PER_BATCH = 4096, 2**22  # a batch ends at whichever comes first


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Encode the texts of IN. Return the path of OUT, the number of its vectors, and their width."""
    source, out = args.input, cli.prepare_new_output(args.out)
    if args.examples and not args.instruction:
        raise UserError("--examples: in-context examples need an instruction. Add --instruction.")
    examples = read_examples(Path(args.examples)) if args.examples else []
    ranges_path, ranges_out = find_ranges(args), args.write_ranges and cli.prepare_new_output(args.write_ranges)
    # A pipe can be read only once. Anything else is read and checked before the model is loaded.
    count = None if is_pipe(source) else sum(1 for _ in read_texts(source, args.field))
    if count == 0:
        raise UserError(f"{source}: has no texts")

    embedder = cli.load_model(args.model, dtype=args.dtype, **cli.get_model_options(args))
    options = {name: getattr(args, name) for name in ("instruction", "prompt_name", "dim", "long_texts")}
    options["examples"] = examples
    if args.instruction is None and args.prompt_name is None and embedder.spec.prompts:
        stored = ", ".join(embedder.spec.prompts)
        plain = repr(embedder.spec.plain_prompt)
        log_once(f"{args.model}: texts get the prompt {plain} (--prompt-name selects a stored one: {stored})", logging.INFO)
    width = embedder.encode([], **options).shape[1]  # checks the options before anything is written
    quantizer = Quantizer(args.precision, read_ranges(ranges_path, width) if ranges_path else None)
    dtype, columns = quantized_layout(args.precision, width)
    _check_disk_space(out, dtype.itemsize * (count or 0) * columns)
    parts = (quantizer(embedder.encode(texts, **options)) for texts in group_texts(read_texts(source, args.field)))
    with atomic_write(out) as partial:
        written = write_vectors(partial, out, parts, columns, count, dtype)
        if not written:
            raise UserError(f"{source}: has no texts")
        if count not in (None, written):
            raise UserError(f"{source}: changed while it was read ({count:,} texts, then {written:,}). Run the command again.")
        if ranges_out and quantizer.found_ranges is not None:
            with atomic_write(ranges_out) as partial_ranges, partial_ranges.open("wb") as file:
                np.save(file, quantizer.found_ranges)
    return {"out": str(out), "vectors": written, "width": width} | (
        {} if args.precision == "float32" else {"precision": args.precision}
    )


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


def find_ranges(args: argparse.Namespace) -> Path | None:
    """Return the file of ranges for --precision: --ranges, or the one in the folder MODEL. None: no ranges are needed.

    Raises:
        UserError: There is no such file, or --ranges is given for a precision without ranges.
    """
    if not needs_ranges(args.precision):
        if args.ranges:
            raise UserError(f"--ranges: is for --precision int8 and uint8 (found {args.precision}). Remove it.")
        return None
    stored = Path(args.model) / RANGES_FILE
    if not args.ranges and not exists(stored):
        raise UserError(
            f"--precision {args.precision}: needs ranges (found neither --ranges nor {stored}). Encode texts like yours with "
            f"--write-ranges {stored} first."
        )
    return Path(args.ranges) if args.ranges else stored


def is_pipe(source: str) -> bool:
    """Return whether an input is a pipe or a device, such as /dev/stdin, which can be read only once."""
    path = Path(source)
    return exists(path) and not path.is_file() and not path.is_dir()


def group_texts(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield the texts in batches. A batch ends at `TEXTS_PER_BATCH` texts or `CHARS_PER_BATCH` characters."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) == TEXTS_PER_BATCH or chars >= CHARS_PER_BATCH:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def write_vectors(
    partial: Path, out: Path, parts: Iterable[np.ndarray], width: int, count: int | None, dtype: np.dtype = FLOAT32
) -> int:
    """Write vectors to a .npy file, one part after the other, and return their number.

    The file is not memory-mapped, so a full disk raises an error instead of SIGBUS.

    Args:
        partial: The file to write.
        out: The name that errors give it.
        parts: Vectors [n, width] each.
        width: Width of the vectors.
        count: Expected number of vectors, for the progress bar. None: unknown.
        dtype: Dtype of the file.
    """
    written = 0
    try:
        with partial.open("wb") as file, tqdm(total=count, unit="text") as bar:
            # The header has a fixed length, and is written again when the number of vectors is known.
            _write_header(file, (0, width), dtype)
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).tobytes())
                written += len(part)
                bar.update(len(part))
            file.seek(0)
            _write_header(file, (written, width), dtype)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Free space, or name another output.") from None
    return written


def _write_header(file: IO[bytes], shape: tuple[int, int], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})


def _check_disk_space(out: Path, needed: int) -> None:
    """Raise `UserError` if an output of `needed` bytes does not fit on its disk.

    Without this check a full disk would be noticed only while writing.
    """
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{out}: needs {needed / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB left. Free space, or name another "
            "output."
        )


def read_examples(path: Path) -> list[tuple[str, str]]:
    """Read the (query, response) pair of each row of a JSONL file.

    Raises:
        UserError: If a row is malformed. The error names file and line.
    """
    from jaxembed.data.containers import open_container
    from jaxembed.data.rows import IndexedRows, RowSchema
    from jaxembed.data.sampling import iter_rows
    from jaxembed.data.schema import check_few_shot_example

    rows = IndexedRows(open_container(str(path)), RowSchema("few_shot_examples", check_few_shot_example))
    return [(row["query"], row["response"]) for row in iter_rows(rows)]


def read_texts(source: str, field: str) -> Iterator[str]:
    """Yield the texts of an input: the lines of a text file, or one field of each row of any other.

    The ending of a file decides how it is read, as in training (`data.containers`). Blank lines of a text file are empty texts,
    so that lines and vectors correspond; those at its end are skipped. Texts are cut at `MAX_TEXT_CHARS`.

    Raises:
        UserError: If a line is malformed. The error names file and line.
    """
    cut = 0
    for text in _read_whole_texts(source, field):
        cut += len(text) > MAX_TEXT_CHARS
        yield text[:MAX_TEXT_CHARS]
    if cut:
        log_once(f"{source}: {cut:,} texts have more than {MAX_TEXT_CHARS:,} characters and are cut there")


def _read_whole_texts(source: str, field: str) -> Iterator[str]:
    from jaxembed.data.containers import FILE_READERS, LINE_READERS, find_line_reader, get_ending, open_container
    from jaxembed.data.jsonl import TextLinesFile

    path = Path(source)
    if not exists(path) or path.is_dir() or get_ending(path) in FILE_READERS.keys() - LINE_READERS.keys():
        yield from _read_field(open_container(source).scan(), field)
        return
    try:
        with path.open("rb") as file:
            first_lines: list[bytes] = []  # the lines that `find_line_reader` consumes; a pipe cannot be rewound
            reader = find_line_reader(path, _record(file, first_lines))
            lines = chain(first_lines, file)
            yield from (
                _read_lines(lines, source) if reader is TextLinesFile else _read_field(reader.scan_lines(lines, source), field)
            )
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None


def _record(lines: Iterable[bytes], taken: list[bytes]) -> Iterator[bytes]:
    """Yield lines, and append each one to a list."""
    for line in lines:
        taken.append(line)
        yield line


def _read_lines(lines: Iterable[bytes], source: str) -> Iterator[str]:
    """Yield the lines of a text file without the blank ones at its end."""
    blank: list[str] = []  # blank lines since the last text
    for number, line in enumerate(lines, 1):
        text = decode(line, f"{source}:{number}").rstrip("\r\n")
        if not text.strip():
            blank.append(text)
            continue
        yield from blank
        blank = []
        yield text


def _read_field(rows: Iterable[tuple[int, str, Any]], field: str) -> Iterator[str]:
    """Yield one field of every row."""
    from jaxembed.data.columns import parse_content

    for _, where, content in rows:
        text = parse_content(content, where).get(field)
        if not isinstance(text, str):
            raise UserError(f'{where}: no string field "{field}". Name the field to encode by --field.')
        yield text


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    about = (
        "OUT.npy has one vector of unit length per line or row, in input order. Memory does not grow with the file.\n"
        f"Texts are cut at {MAX_TEXT_CHARS:,} characters before they are tokenized. Blank lines at the end are skipped."
    )
    parser = cli.new_parser("encode", f"{__doc__}\n{about}")
    cli.add_model_arguments(parser)
    parser.add_argument(
        "input",
        metavar="IN",
        help="texts: .txt, one per line; or rows: .jsonl, .ndjson, .json (one row per line), .csv or .tsv with a header, "
        ".parquet, .array_record; or a pipe, such as /dev/stdin, with JSON rows or lines of text",
    )
    parser.add_argument("out", metavar="OUT.npy", help="output; must not exist")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--instruction", help="instruction of every text, put into the model's template")
    prompts.add_argument("--prompt-name", metavar="NAME", help="name of a prompt stored with the model, such as query")
    parser.add_argument(
        "--examples",
        metavar="FILE.jsonl",
        help='in-context examples (few-shot) that precede the instruction: lines {"query": ..., "response": ...}',
    )
    parser.add_argument("--dim", type=int, help="number of leading dimensions to keep (Matryoshka)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="numbers in OUT.npy: float32 (default), int8 or uint8 (see --ranges), or 8 sign bits per byte (binary, ubinary)",
    )
    parser.add_argument(
        "--ranges",
        metavar="RANGES.npy",
        help=f"ranges of --precision int8 and uint8 (default: {RANGES_FILE} in the folder MODEL)",
    )
    parser.add_argument(
        "--write-ranges", metavar="RANGES.npy", help="write the lowest and highest value of each dimension, for --ranges"
    )
    parser.add_argument(
        "--long-texts",
        choices=["cut", "mean", "max"],
        default="cut",
        help="truncate texts that are too long (cut, default), or combine the vectors of their pieces",
    )
    parser.add_argument("--field", default="text", help="field of a row to encode (default: text)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the computation (default: float32)"
    )
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
