"""Inspect, check, convert and create training data.

Usage: python -m jaxembed.data validate|preview|stats|convert SOURCE ...
       python -m jaxembed.data packages OUT
       python -m jaxembed.data documents FOLDER OUT.jsonl
       python -m jaxembed.data split PAIRS OUT
"""

from __future__ import annotations

import argparse
import glob
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxembed import cli, config
from jaxembed.config.sections import parse_section
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.curation import passages, python_packages
from jaxembed.data import reports
from jaxembed.data.convert import WRITERS, convert_sources, name_files
from jaxembed.data.heldout import split_pairs
from jaxembed.errors import UserError
from jaxembed.files import cache_dir
from jaxembed.training.shutdown import stop_on_signals

if TYPE_CHECKING:
    from jaxembed.data.tokenize import TextTokenizer

DESCRIPTIONS = {
    "validate": "Open sources as training does, and list bad rows by file and line (at most 20 per source; exit code 2). "
    "With --config, print a table of the sources: which can be used, and what is missing for the others.",
    "preview": "Print the first batch as the model sees it, and the lengths of its texts.",
    "stats": "Print rows, examples, lengths, duplicates, labels, positives and negatives of each source, and shared texts. "
    "With --vectors, also the coverage of the sources and their distance to each other and to evaluation sets.",
    "convert": "Write sources as .jsonl or .array_record files, one per source, with jaxembed's field names.",
    "packages": "Write docstring -> function pairs of installed Python packages: train.jsonl, and the held-out BEIR folders "
    "functions/ and package/. Does nothing if OUT holds the pairs of the same packages and versions.",
    "documents": "Split the text, Markdown, HTML and PDF files of a folder into passages: rows of id, title and text.",
    "split": "Divide rows of pairs into train.jsonl and the BEIR folder heldout/. No document is a positive of both.",
}
MAX_SHARDS = 99_999  # the numbers in the names of shards have five digits
log = logging.getLogger("jaxembed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run a command and return its report."""
    if args.command == "packages":
        return write_packages(args)
    if args.command == "documents":
        return write_documents(args)
    if args.command == "split":
        return split(args)
    if args.command == "convert" and args.out is None:
        args.out = take_last_source(args)
    settings = config.load_config(args.config, base="") if args.config else None
    data = read_data(args, settings)
    if args.command == "convert":
        return convert(args, data)
    with stop_on_signals("nothing is written; the same command starts over"):
        return inspect_sources(args, data, settings)


def inspect_sources(args: argparse.Namespace, data: config.DataConfig, settings: config.Config | None) -> dict[str, Any]:
    """Run a command that only reads its sources. Return its report."""
    if args.command == "validate":
        report = reports.validate_sources(data, cache_dir())
        for source in report["sources"]:
            print(*source["problems"], sep="\n", end="\n" if source["problems"] else "", file=sys.stderr)
        if settings:
            print(*reports.format_validation_table(report["sources"]), sep="\n")
        return report
    spec, tokenizer = open_tokenizer(args.model, settings)
    if args.command == "stats":
        return compute_stats(args, data, tokenizer)
    return preview(args, data, spec, tokenizer)


def compute_stats(args: argparse.Namespace, data: config.DataConfig, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Return the statistics of sources. With --vectors, also print tables of their coverage and add these to the report."""
    if not args.vectors:
        if args.against:
            raise UserError("--against: compares vectors. Name their model with --vectors MODEL.")
        return reports.compute_stats(data, cache_dir(), tokenizer)
    cli.set_up_jax()
    from jaxembed.curation.data_insight import InsightOptions, describe_sources, format_tables
    from jaxembed.hub.frozen_encoder import check_model_exists, open_frozen_encoder

    check_model_exists(args.vectors)
    evaluation_sets = {name: read_queries(name) for name in args.against}
    report = reports.compute_stats(data, cache_dir(), tokenizer)
    encoder = open_frozen_encoder(args.vectors, cache_dir())
    options = InsightOptions(args.max_texts, args.clusters)
    insight = describe_sources(data, evaluation_sets, encoder, cache_dir(), options)
    print(*format_tables(insight), sep="\n")
    return {**report, "vectors": insight}


def read_queries(name: str) -> list[str]:
    """Return the queries of an evaluation set: a BEIR folder, a file of rows, or an MTEB task.

    A task without queries, such as classification, gives all its texts.
    """
    from jaxembed.curate import read_task
    from jaxembed.curation.steps.decontamination import DOCUMENTS_PART, read_beir_parts, read_file_parts
    from jaxembed.data.containers import is_beir_folder

    path = Path(name)
    if is_beir_folder(path):
        parts = read_beir_parts(path)
    elif path.exists() or path.suffix or "/" in name:
        parts = read_file_parts(name, cache_dir())
    else:
        parts = read_task(name)
    return [text for part, texts in parts if part != DOCUMENTS_PART for text in texts]


def write_packages(args: argparse.Namespace) -> dict[str, Any]:
    """Write the pairs of installed packages. Return the folder and the number of pairs of each split."""
    out = cli.prepare_output(Path(args.out))
    with stop_on_signals(f"{out} was not written; the same command starts over"):
        sizes = python_packages.write_package_pairs(out, args.packages, args.holdout_package or None, args.holdout_functions)
    return {"out": str(out), **sizes}


def write_documents(args: argparse.Namespace) -> dict[str, Any]:
    """Write the passages of a folder of documents. Return the file, and counts of files, passages and what was left out."""
    out = cli.prepare_new_output(args.out, [".jsonl"])
    limits = read_passage_limits(args)
    with stop_on_signals(f"{out} was not written; the same command starts over"):
        report = passages.write_passages(Path(args.folder), out, limits, args.skip_bad_files)
    return {"out": str(out), **report}


def split(args: argparse.Namespace) -> dict[str, Any]:
    """Divide pairs into a training file and a held-out folder. Return the folder and the numbers of rows."""
    out = cli.prepare_new_output(args.out)
    with stop_on_signals(f"{out} was not written; the same command starts over"):
        return {"out": str(out), **split_pairs(args.pairs, out, args.percent / 100, args.documents)}


def read_passage_limits(args: argparse.Namespace) -> passages.PassageLimits:
    """Return the lengths of passages that the options name."""
    if (args.max_tokens is None) != (args.model is None):
        raise UserError("--max-tokens: needs --model MODEL, whose tokens are counted. Give both, or only --max-chars.")
    tokenizer = open_tokenizer(args.model, None)[1]
    if tokenizer is None:
        return passages.PassageLimits(args.max_chars, args.min_chars)

    def count_tokens(text: str) -> int:
        return int(tokenizer.count_untruncated_tokens([text], [""])[0])

    return passages.PassageLimits(args.max_tokens, args.min_chars, count_tokens)


def preview(
    args: argparse.Namespace, data: config.DataConfig, spec: EmbeddingSpec, tokenizer: TextTokenizer | None
) -> dict[str, Any]:
    """Print a batch, one text per line. Return the number of texts and their lengths, by role."""
    unit = "tokens" if tokenizer else "characters"
    lengths: dict[str, list[int]] = {}
    for entry in reports.preview_batch(data, cache_dir(), args.batch_size, args.seed, spec, tokenizer):
        lengths.setdefault(entry.role, []).append(entry.length)
        text = (f"[{entry.prompt}] " if entry.prompt else "") + entry.text
        print(f"{entry.source}  {entry.role:8} {entry.length:5} {unit}  {text!r}")
    totals = {role: {"texts": len(n), "longest": max(n), "total": sum(n)} for role, n in lengths.items()}
    return {"lengths_in": unit, **totals}


def take_last_source(args: argparse.Namespace) -> str:
    """Remove the last SOURCE and return it as the output, where earlier versions expected it."""
    if not args.sources:
        raise UserError("convert: the output is missing. Name it with --out OUT.")
    out = str(args.sources.pop())
    log.warning("convert: the last SOURCE, %s, is taken as the output. Name it with --out %s instead.", out, out)
    return out


def convert(args: argparse.Namespace, data: config.DataConfig) -> dict[str, Any]:
    """Convert sources. Return the files, for each source one path (a pattern if it has several files), and the row count."""
    names = name_files(data.sources, args.out)
    if len(names) > 1 and "*" not in args.out:
        raise UserError(
            f"{args.out}: needs a * (replaced by the source name) because there are {len(names)} sources. "
            "Write for example 'out/*.jsonl'."
        )
    outs = [args.out.replace("*", name) for name in names]
    outputs = [[cli.prepare_new_output(path, WRITERS) for path in list_shards(out, args.shards)] for out in outs]
    rows = convert_sources(data, cache_dir(), outputs, args.pairs)
    paths = outs if args.shards == 1 else [name_shard(glob.escape(out), "*", args.shards) for out in outs]
    return {"files": [str(path) for source_paths in outputs for path in source_paths], "paths": paths, "rows": rows}


def list_shards(out: str, count: int) -> list[str]:
    """Return the paths of the shards of an output: NAME-00000-of-00002.jsonl, and so on. A single one keeps its name."""
    return [out] if count == 1 else [name_shard(out, f"{i:05d}", count) for i in range(count)]


def name_shard(out: str, number: str, count: int) -> str:
    """Return the path of one shard."""
    path = Path(out)
    return str(path.with_name(f"{path.stem}-{number}-of-{count:05d}{path.suffix}"))


def read_data(args: argparse.Namespace, settings: config.Config | None) -> config.DataConfig:
    """Return the `data` section of a config, with the sources of all stages, or a section of the named sources.

    A preview has only the sources of the first stage.
    """
    if bool(args.sources) == bool(settings):
        raise UserError("SOURCE: expected either sources or --config CONFIG.yaml. Name one of the two.")
    row_settings, hard_negatives = cli.get_row_settings(args), args.hard_negatives
    if settings is None:
        sources = [parse_section(config.SourceConfig, row_settings | {"path": path}, "command line") for path in args.sources]
        tree = {"sources": sources, "hard_negatives": 1 if hard_negatives is None else hard_negatives}
        return parse_section(config.DataConfig, tree, "command line")
    if hard_negatives is not None:
        raise UserError("--hard-negatives: applies to named sources only. Set data.hard_negatives in the config.")
    data = settings.stages[0].data
    return data if args.command == "preview" else data.model_copy(update={"sources": settings.all_sources()})


def open_tokenizer(model: str | None, settings: config.Config | None) -> tuple[EmbeddingSpec, TextTokenizer | None]:
    """Return the spec of a model, with the choices of a config, and its tokenizer; None for the tokenizer without a model."""
    choices = (settings.model, settings.data.max_length) if settings else None
    if model is None:
        return EmbeddingSpec().apply_model_config(*choices) if choices else EmbeddingSpec(), None
    from jaxembed.hub.resolve import find_base
    from jaxembed.hub.text_tokenizer import build_text_tokenizer

    base = find_base(model)
    if not base.has_weights:
        raise UserError(f"--model {model}: a preset has no tokenizer. Name a model that has one.")
    spec = base.spec.apply_model_config(*choices) if choices else base.spec
    return spec, build_text_tokenizer(base.tokenizer(), spec, base)


class DataParser(cli.Parser):
    """A parser that accepts sources after options too, which argparse does not support together with subcommands."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the command line. Arguments that argparse leaves over are sources, unless they look like options."""
        options, extra_args = self.parse_known_args(args, namespace)
        unknown = [text for text in extra_args if text.startswith("-") or not hasattr(options, "sources")]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if extra_args:
            options.sources += extra_args
        return options


def make_parser() -> DataParser:
    """Build the parser of all data commands."""
    parser = DataParser(
        prog="python -m jaxembed.data",
        description=f"{__doc__}\nSOURCE is a value of data.sources[].path: see docs/guides/data.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in DESCRIPTIONS.items():
        command = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        if name in ARGUMENT_ADDERS:
            ARGUMENT_ADDERS[name](command)
            continue
        command.add_argument("sources", metavar="SOURCE", nargs="*", help="path or name, as in a config")
        command.add_argument("--config", metavar="CONFIG.yaml", help="take the sources of a config instead")
        cli.add_row_arguments(command)
        command.set_defaults(hard_negatives=None)
        if name in ("preview", "stats"):
            command.add_argument("--model", metavar="MODEL", help="model whose tokens are counted (default: count characters)")
        if name == "stats":
            add_stats_arguments(command)
        if name == "preview":
            add_preview_arguments(command)
        if name == "convert":
            add_convert_arguments(command)
    return parser


def add_stats_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about vectors."""
    parser.add_argument(
        "--vectors", metavar="MODEL",
        help="print effective rank, coverage, clusters, languages and nearness of the sources, by the vectors of this model",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="SET",
        help="evaluation sets whose distance to each source is measured: BEIR folders, files of rows, or MTEB tasks",
    )  # fmt: skip
    parser.add_argument(
        "--max-texts",
        type=cli.integer_from(2),
        default=2000,
        metavar="N",
        help="queries of each source and set (default: 2000)",
    )
    parser.add_argument(
        "--clusters", type=cli.integer_from(2), default=20, metavar="N", help="clusters of all sources (default: 20)"
    )


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that shape the batch."""
    parser.add_argument(
        "--batch-size", type=cli.integer_from(1), default=8, metavar="N", help="queries of the batch (default: 8)"
    )
    parser.add_argument(
        "--hard-negatives", type=cli.integer_from(0), metavar="N", help="negatives per query of named sources (default: 1)"
    )
    parser.add_argument("--seed", type=cli.integer_from(0), default=0, help="seed of the order and of every draw (default: 0)")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the output."""
    parser.add_argument(
        "--out", metavar="OUT",
        help=".jsonl or .array_record file, which must not exist; * is replaced by the source name (default: the last SOURCE)",
    )  # fmt: skip
    parser.add_argument("--pairs", action="store_true", help="write rows of pairs (query, pos, neg), regardless of the format")
    parser.add_argument(
        "--shards", type=cli.integer_from(1, MAX_SHARDS), default=1, metavar="N", help="files per source (default: 1)"
    )


def add_package_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the output folder and the choice of packages."""
    default_names = " ".join(python_packages.DEFAULT_PACKAGES)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--packages", nargs="+", metavar="NAME", default=python_packages.DEFAULT_PACKAGES,
        help=f"import names of packages, or stdlib; absent ones are skipped (default: {default_names})",
    )  # fmt: skip
    parser.add_argument(
        "--holdout-package", metavar="NAME", default=python_packages.DEFAULT_HOLDOUT_PACKAGE,
        help=f"package that is held out as a whole, or '' for none (default: {python_packages.DEFAULT_HOLDOUT_PACKAGE})",
    )  # fmt: skip
    parser.add_argument(
        "--holdout-functions", type=cli.integer_from(0), metavar="N", default=python_packages.DEFAULT_HOLDOUT_FUNCTIONS,
        help=f"functions of the other packages to hold out (default: {python_packages.DEFAULT_HOLDOUT_FUNCTIONS})",
    )  # fmt: skip


def add_document_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the output and the lengths of passages."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of documents, or one file; hidden files are left out")
    parser.add_argument("out", metavar="OUT.jsonl", help="file to write, which must not exist")
    parser.add_argument(
        "--max-chars",
        type=cli.integer_from(1),
        default=1500,
        metavar="N",
        help="maximum characters of a passage (default: 1500)",
    )
    parser.add_argument(
        "--max-tokens", type=cli.integer_from(1), metavar="N", help="maximum tokens of a passage, instead of --max-chars"
    )
    parser.add_argument("--model", metavar="MODEL", help="model whose tokens --max-tokens counts")
    parser.add_argument(
        "--min-chars", type=cli.integer_from(1), default=50, metavar="N", help="shorter passages are dropped (default: 50)"
    )
    parser.add_argument(
        "--skip-bad-files", action="store_true", help="leave out files that cannot be read (default: write nothing)"
    )


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the pairs, the output, and the size of the held-out part."""
    parser.add_argument("pairs", metavar="PAIRS", help="file of rows with query and pos")
    parser.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    parser.add_argument(
        "--percent",
        type=cli.integer_from(1, 99),
        default=10,
        metavar="N",
        help="percent of the positives to hold out (default: 10)",
    )
    parser.add_argument(
        "--documents",
        default="",
        metavar="FILE",
        help="rows with text: further documents of the held-out corpus, such as passages",
    )


ARGUMENT_ADDERS = {  # of commands without a SOURCE
    "packages": add_package_arguments,
    "documents": add_document_arguments,
    "split": add_split_arguments,
}


if __name__ == "__main__":
    sys.exit(2 if cli.run_command(main, make_parser()).get("bad_rows") else 0)
