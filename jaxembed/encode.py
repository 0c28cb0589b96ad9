"""A vector for every line of a file: python -m jaxembed.encode MODEL IN.jsonl|IN.txt OUT.npy"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.errors import UserError
from jaxembed.files import decode, written_whole

LINES_AT_ONCE = 4096


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the output, how many vectors it holds and their width."""
    source, out = Path(args.input), cli.new_output(args.out)
    if args.examples and not args.instruction:
        raise UserError("--examples are presented under an instruction: name it with --instruction")
    examples = read_examples(Path(args.examples)) if args.examples else []
    count = sum(1 for _ in read_texts(source, args.field))
    if not count:
        raise UserError(f"{source}: the file holds no lines")
    import numpy as np
    from tqdm import tqdm

    embedder = cli.load_model(args.model, dtype=args.dtype, **cli.model_options(args))
    options = {name: getattr(args, name) for name in ("instruction", "prompt_name", "dim", "long_texts")}
    options["examples"] = examples
    width = embedder.encode([], **options).shape[1]  # refuses what does not fit the model before anything is written
    needed, free = 4 * count * width, shutil.disk_usage(out.parent).free
    if needed > free:  # a file that is mapped into memory would end the process where the disk is full
        told = f"it takes {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left"
        raise UserError(f"{out}: {told}; make room or name another output")
    with written_whole(out) as partial:
        vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, width))
        lines, done = read_texts(source, args.field), 0
        with tqdm(total=count, unit="text") as bar:
            while texts := list(islice(lines, LINES_AT_ONCE)):
                vectors[done : done + len(texts)] = embedder.encode(texts, **options)
                done += len(texts)
                bar.update(len(texts))
        vectors.flush()
    return {"out": str(out), "vectors": count, "width": width}


def read_examples(path: Path) -> list[tuple[str, str]]:
    """The (query, response) of each row of a JSONL file; `UserError` names file and line."""
    from jaxembed.data.containers import open_container
    from jaxembed.data.rows import Rows, RowSchema
    from jaxembed.data.sampling import iter_rows
    from jaxembed.data.schema import check_shot

    rows = Rows(open_container(str(path)), RowSchema("shots", check_shot))
    return [(row["query"], row["response"]) for row in iter_rows(rows)]


def read_texts(path: Path, field: str) -> Iterator[str]:
    """The lines of a text file, or one field of each row of a JSONL file; `UserError` names file and line."""
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
                    raise UserError(f'{where}: no string field "{field}"; name the field to encode with --field')
                yield text
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


if __name__ == "__main__":
    parser = cli.parser("encode", __doc__ + "\n\nInput order, float32, unit length. Files of any size: memory stays flat.")
    cli.add_model(parser)
    parser.add_argument("input", metavar="IN", help="a text file (a text a line) or .jsonl")
    parser.add_argument("out", metavar="OUT.npy", help="must not exist")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--instruction", help="put before every text by the model's template")
    prompts.add_argument("--prompt-name", metavar="NAME", help="a prompt stored with the model, such as query")
    parser.add_argument(
        "--examples", metavar="FILE.jsonl", help='few-shot: lines {"query": ..., "response": ...}, put before the instruction'
    )
    parser.add_argument("--dim", type=int, help="keep the first numbers of each vector (Matryoshka)")
    parser.add_argument(
        "--long-texts", choices=["cut", "mean", "max"], default="cut", help="cut (default), or combine the vectors of pieces"
    )
    parser.add_argument("--field", default="text", help="of the rows of a .jsonl file (default: text)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    cli.run(main, parser)
