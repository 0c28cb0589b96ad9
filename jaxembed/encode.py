"""Encode every line of a file into a vector.

Usage: python -m jaxembed.encode MODEL IN.jsonl|IN.txt OUT.npy
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, decode

LINES_PER_BATCH = 4096


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Return the output, the number of its vectors, and their width."""
    source, out = Path(args.input), cli.new_output(args.out)
    if args.examples and not args.instruction:
        raise UserError("--examples: in-context examples need an instruction. Add --instruction.")
    examples = read_examples(Path(args.examples)) if args.examples else []
    count = sum(1 for _ in read_texts(source, args.field))
    if not count:
        raise UserError(f"{source}: the file has no lines")
    import numpy as np
    from tqdm import tqdm

    embedder = cli.load_model(args.model, dtype=args.dtype, **cli.model_options(args))
    options = {name: getattr(args, name) for name in ("instruction", "prompt_name", "dim", "long_texts")}
    options["examples"] = examples
    width = embedder.encode([], **options).shape[1]  # checks the options before anything is written
    _check_disk_space(out, 4 * count * width)
    with atomic_write(out) as partial:
        vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, width))
        lines, done = read_texts(source, args.field), 0
        with tqdm(total=count, unit="text") as bar:
            while texts := list(islice(lines, LINES_PER_BATCH)):
                vectors[done : done + len(texts)] = embedder.encode(texts, **options)
                done += len(texts)
                bar.update(len(texts))
        vectors.flush()
    return {"out": str(out), "vectors": count, "width": width}


def _check_disk_space(out: Path, needed: int) -> None:
    """Raise `UserError` if an output of so many bytes does not fit on its disk.

    Without this check a full disk would kill the process, because the output is mapped into memory.
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


def read_texts(path: Path, field: str) -> Iterator[str]:
    """Yield the lines of a text file, or one field of each row of a JSONL file.

    Raises:
        UserError: If a line is malformed. The error names file and line.
    """
    from jaxembed.data.schema import parse_row

    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if path.suffix != ".jsonl":
                    yield decode(line, where).rstrip("\r\n")
                    continue
                text = parse_row(line, where).get(field)
                if not isinstance(text, str):
                    raise UserError(f'{where}: no string field "{field}". Name the field to encode by --field.')
                yield text
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    about = "OUT.npy has one float32 vector of unit length per line, in input order. Memory does not grow with the file."
    parser = cli.new_parser("encode", f"{__doc__}\n{about}")
    cli.add_model_arguments(parser)
    parser.add_argument("input", metavar="IN", help="text file (one text per line) or .jsonl file")
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
        "--long-texts",
        choices=["cut", "mean", "max"],
        default="cut",
        help="truncate texts that are too long (cut, default), or combine the vectors of their pieces",
    )
    parser.add_argument("--field", default="text", help="field of a .jsonl row to encode (default: text)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the computation (default: float32)"
    )
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
