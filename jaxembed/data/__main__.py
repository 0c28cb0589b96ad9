"""Looks at training data, checks it and converts it: python -m jaxembed.data validate|preview|stats|convert SOURCE ..."""

from __future__ import annotations

import argparse
import glob
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxembed import cli, config
from jaxembed.config.sections import parse_section
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data import reports
from jaxembed.errors import UserError
from jaxembed.files import cache_dir

if TYPE_CHECKING:
    from jaxembed.data.tokenize import TextTokenizer

ABOUT = {
    "validate": "Opens sources as training does, tells bad rows by file and line (up to 20 a source), and exits 2 for any.",
    "preview": "Prints the first batch as the model will see it, and how long its texts are.",
    "stats": "Rows, examples, lengths, duplicates, labels, positives and negatives of each source, and what sources share.",
    "convert": "Writes any sources as .jsonl or .array_record, a file each, their fields under our names.",
}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the report of a command."""
    if args.command == "convert" and args.behind:  # the last is OUT, wherever the options stand
        args.sources.append(args.out)
        args.out = args.behind.pop()
    args.sources += args.behind
    settings = config.load_config(args.config, base="") if args.config else None
    data = read_data(args, settings)
    if args.command == "convert":
        return convert(args, data)
    if args.command == "validate":
        report = reports.validate(data, cache_dir())
        for source in report["sources"]:
            print(*source["problems"], sep="\n", end="\n" if source["problems"] else "", file=sys.stderr)
        return report
    spec, tokenizer = open_tokenizer(args.model, settings)
    if args.command == "stats":
        return reports.stats(data, cache_dir(), tokenizer)
    return preview(args, data, spec, tokenizer)


def preview(
    args: argparse.Namespace, data: config.DataConfig, spec: EmbeddingSpec, tokenizer: TextTokenizer | None
) -> dict[str, Any]:
    """Prints a batch, a text a line; returns how many texts there are and how long, by role."""
    unit = "tokens" if tokenizer else "characters"
    lengths: dict[str, list[int]] = {}
    texts = reports.preview(data, cache_dir(), args.batch_size, args.seed, spec, tokenizer)
    for source, role, prompt, text, length in texts:
        lengths.setdefault(role, []).append(length)
        print(f"{source}  {role:8} {length:5} {unit}  {(f'[{prompt}] ' if prompt else '') + text!r}")
    return {"lengths_in": unit, **{role: {"texts": len(n), "longest": max(n), "total": sum(n)} for role, n in lengths.items()}}


def convert(args: argparse.Namespace, data: config.DataConfig) -> dict[str, Any]:
    """Writes sources anew; returns the files, the paths that name what was made of each source, and how many rows there are."""
    names = [re.sub(r"[^\w.-]", "_", source.display_name) for source in data.sources]
    if len(names) > 1 and "*" not in args.out:
        told = f"{len(names)} sources want a file each: put a * where their names are to stand, as in 'out/*.jsonl'"
        raise UserError(f"{args.out}: {told}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{args.out}: several sources are called {twice[0]}; give each a name of its own in the config")
    outs = [args.out.replace("*", name) for name in names]
    targets = [[cli.new_output(path, reports.WRITERS) for path in shards(out, args.shards)] for out in outs]
    rows = reports.convert(data, cache_dir(), targets, args.pairs)
    paths = outs if args.shards == 1 else [shard(glob.escape(out), "*", args.shards) for out in outs]
    return {"files": [str(target) for of_source in targets for target in of_source], "paths": paths, "rows": rows}


def shards(out: str, count: int) -> list[str]:
    """The names of the files of a set."""
    return [out] if count == 1 else [shard(out, f"{i:05d}", count) for i in range(count)]


def shard(out: str, number: str, count: int) -> str:
    path = Path(out)
    return str(path.with_name(f"{path.stem}-{number}-of-{count:05d}{path.suffix}"))


def read_data(args: argparse.Namespace, settings: config.Config | None) -> config.DataConfig:
    """The data section of a config, with the sources of all its stages, or one out of the sources that are named."""
    if bool(args.sources) == bool(settings):
        raise UserError("name the sources to look at, or a config that has some by --config, not both")
    rows, negatives = cli.row_options(args), args.hard_negatives
    if settings is None:
        named = [parse_section(config.SourceConfig, rows | {"path": path}, "command line") for path in args.sources]
        tree = {"sources": named, "hard_negatives": 1 if negatives is None else negatives}
        return parse_section(config.DataConfig, tree, "command line")
    if negatives is not None:
        raise UserError("--hard-negatives is of sources that are named; set data.hard_negatives in the config")
    return settings.in_stages()[0].data.model_copy(update={"sources": settings.all_sources()})


def open_tokenizer(model: str | None, settings: config.Config | None) -> tuple[EmbeddingSpec, TextTokenizer | None]:
    """How a model reads texts, under the choices of a config; without a model, by the choices alone."""
    choices = (settings.model, settings.data.max_length) if settings else None
    if model is None:
        return EmbeddingSpec().with_choices(*choices) if choices else EmbeddingSpec(), None
    from jaxembed.hub.base import find_base
    from jaxembed.hub.restore import text_tokenizer

    base = find_base(model)
    if base.folder is None:
        raise UserError(f"--model {model}: a preset has no tokenizer; name a model that has one")
    spec = base.spec.with_choices(*choices) if choices else base.spec
    return spec, text_tokenizer(base.tokenizer(), spec, base)


def make_parser() -> cli.Parser:
    parser = cli.parser("data", __doc__ + "\n\nSOURCE is what data.sources[].path takes: see docs/data.md.")
    parser.intermixed = True
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, about in ABOUT.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.add_argument("sources", metavar="SOURCE", nargs="*", help="path or name, as in a config")
        command.add_argument("--config", metavar="CONFIG.yaml", help="take the sources of a config instead")
        cli.add_rows(command)
        command.set_defaults(hard_negatives=None)
        if name in ("preview", "stats"):
            command.add_argument("--model", metavar="MODEL", help="count the tokens of this model, not characters")
        if name == "preview":
            command.add_argument("--batch-size", type=cli.whole(1), default=8, metavar="N", help="queries (default: 8)")
            command.add_argument("--hard-negatives", type=cli.whole(0), metavar="N", help="of named sources (default: 1)")
            command.add_argument("--seed", type=cli.whole(0), default=0, help="of the order and of what is drawn (default: 0)")
        if name == "convert":
            command.add_argument(
                "out", metavar="OUT", help=".jsonl or .array_record; must not exist; a * is the name of the source"
            )
            command.add_argument("--pairs", action="store_true", help="as rows of pairs (query, pos, neg), whatever they are")
            command.add_argument("--shards", type=cli.whole(1), default=1, metavar="N", help="files of a source (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(2 if cli.run(main, make_parser()).get("bad_rows") else 0)
