"""Encode every line of a text file, or every row of another file, into a vector.

Usage: python -m jaxembed.encode MODEL IN OUT.npy
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed import cli
from jaxembed.config.field_lists import log_once
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.npy_writer import check_disk_space, write_vectors
from jaxembed.data.text_input import group_texts, is_pipe, read_few_shot_examples, read_texts
from jaxembed.data.tokenize import MAX_TEXT_CHARS
from jaxembed.errors import UserError
from jaxembed.files import atomic_write
from jaxembed.search.precision import PRECISIONS, RANGES_FILE, Quantizer, find_ranges, get_quantized_layout, read_ranges

DEFAULT_TOP = 10  # documents that --search finds per text


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Encode the texts of IN, or find their nearest documents. Return the path of OUT, and counts."""
    source, out = args.input, cli.prepare_new_output(args.out, [".jsonl"] if args.search else ())
    if args.examples and not args.instruction:
        raise UserError("--examples: in-context examples need an instruction. Add --instruction.")
    examples = read_few_shot_examples(Path(args.examples)) if args.examples else []
    ranges_path = find_ranges([args.precision], args.model, args.ranges)
    ranges_out = args.write_ranges and cli.prepare_new_output(args.write_ranges)
    if ranges_out:
        cli.check_not_out(ranges_out, "--write-ranges", out)
    documents = open_documents(args)
    # A pipe can be read only once. Anything else is read and checked before the model is loaded.
    count = None if is_pipe(source) else sum(1 for _ in read_texts(source, args.field))
    if count == 0:
        raise UserError(f"{source}: has no texts")

    embedder = cli.load_model(args.model, dtype=args.dtype, **cli.get_model_options(args))
    options = {name: getattr(args, name) for name in ("instruction", "prompt_name", "dim", "long_texts")}
    options["examples"] = examples
    if args.instruction is None and args.prompt_name is None:
        log_plain_prompt(args.model, embedder.spec)
    width = embedder.encode([], **options).shape[1]  # checks the options before anything is written
    ranges = read_ranges(ranges_path, width) if ranges_path else None
    encoded = (embedder.encode(texts, **options) for texts in group_texts(read_texts(source, args.field)))
    groups = iter_checked(encoded, source, count)
    if documents is not None:
        return write_nearest(out, args, groups, documents, width, ranges)
    quantizer = Quantizer(args.precision, ranges)
    dtype, columns = get_quantized_layout(args.precision, width)
    check_disk_space(out, dtype.itemsize * (count or 0) * columns)
    with atomic_write(out) as partial:
        num_written = write_vectors(partial, out, map(quantizer, groups), columns, count, dtype)
        if ranges_out and quantizer.measured_ranges is not None:
            with atomic_write(ranges_out) as partial_ranges, partial_ranges.open("wb") as file:
                np.save(file, quantizer.measured_ranges)
    precision = {} if args.precision == "float32" else {"precision": args.precision}
    return {"out": str(out), "vectors": num_written, "width": width, **precision}


def iter_checked(groups: Iterable[np.ndarray], source: str, count: int | None) -> Iterator[np.ndarray]:
    """Yield vectors group by group, and check their number at the end.

    Args:
        groups: The groups.
        source: The input.
        count: Number of its texts before they were encoded. None: unknown, because it is a pipe.

    Raises:
        UserError: There was no text, or the file changed meanwhile.
    """
    num_encoded = 0
    for group in groups:
        num_encoded += len(group)
        yield group
    if not num_encoded:
        raise UserError(f"{source}: has no texts")
    if count is not None and count != num_encoded:
        raise UserError(f"{source}: changed while it was read ({count:,} texts, then {num_encoded:,}). Run the command again.")


def log_plain_prompt(model: str, spec: EmbeddingSpec) -> None:
    """Log the prompt that texts get without --instruction and --prompt-name, if the model has stored prompts to choose from."""
    if spec.prompts:
        names = ", ".join(spec.prompts)
        message = f"{model}: texts get the prompt {spec.plain_prompt!r} (--prompt-name selects a stored one: {names})"
        log_once(message, logging.INFO)


def open_documents(args: argparse.Namespace) -> np.ndarray | None:
    """Return the vectors that --search names, or None without it. Raise `UserError` if they cannot be searched."""
    if args.search is None:
        if args.top is not None:
            raise UserError("--top: says how many documents to find, so it needs --search DOCUMENTS.npy.")
        return None
    if args.write_ranges:
        raise UserError("--search: finds documents and writes no vectors, so it writes no ranges. Omit --write-ranges.")
    from jaxembed.search.quantized import import_faiss, read_documents

    import_faiss("--search")
    return read_documents(Path(args.search))


def write_nearest(
    out: Path,
    args: argparse.Namespace,
    groups: Iterable[np.ndarray],
    documents: np.ndarray,
    width: int,
    ranges: np.ndarray | None,
) -> dict[str, Any]:
    """Write the nearest documents of each text, one JSON line per text.

    Args:
        out: The file.
        args: Options of the command.
        groups: Vectors of the texts, float32 [n, width] each.
        documents: Vectors of the documents in `args.precision`.
        width: Width of the vectors.
        ranges: Ranges for int8 and uint8, float32 [2, width].

    Returns:
        The path of OUT, the numbers of texts and documents, and the precision.

    Raises:
        UserError: The documents have another width or precision.
    """
    from jaxembed.search.quantized import check_layout, search_quantized

    check_layout(documents, args.precision, width, f"--search {args.search}: its vectors are")
    queries = np.concatenate(list(groups))
    neighbors = search_quantized(queries, documents, args.top or DEFAULT_TOP, args.precision, ranges)
    rows = (
        {"rows": rows, "scores": scores}
        for rows, scores in zip(neighbors.indices.tolist(), neighbors.scores.tolist(), strict=True)
    )
    with atomic_write(out) as partial:
        write_jsonl(partial, rows)
    return {"out": str(out), "texts": len(queries), "documents": len(documents), "precision": args.precision}


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    about = (
        "OUT.npy has one vector of unit length per line or row, in input order. Memory does not grow with the file,\n"
        "except with --search, which keeps the vectors of all texts.\n"
        f"Texts are truncated to {MAX_TEXT_CHARS:,} characters before they are tokenized. Blank lines at the end are skipped."
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
        "--search",
        metavar="DOCUMENTS.npy",
        help="instead of vectors, write the nearest rows of this file, which encode wrote with the same --precision: OUT.jsonl "
        'has {"rows": [...], "scores": [...]} for each text. Needs the eval extra.',
    )
    parser.add_argument(
        "--top", type=cli.integer_from(1), metavar="K", help=f"documents that --search finds per text (default: {DEFAULT_TOP})"
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
