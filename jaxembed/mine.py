"""Finds hard negatives for pairs: python -m jaxembed.mine MODEL IN OUT.jsonl [--corpus PATH ...]"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxembed import cli, config
from jaxembed.cli import whole
from jaxembed.config.sections import parse_section
from jaxembed.curation.rules import NUMBERS, RULES, SAMPLED, Rule
from jaxembed.errors import UserError
from jaxembed.files import cache_dir

ABOUT = """\
IN is whatever training takes, but for rows of text and label. OUT has its rows in the main format, with the negatives that
were found and the scores of positives and negatives. A query's positives, in whatever row, and the query itself are never its
negatives. Vectors are kept: the same command goes on after a stop."""
log = logging.getLogger("jaxembed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the files that were written and the counts of the report."""
    cache = cache_dir()
    with cli.stoppable(f"the vectors and scores so far are kept in {cache}; the same command goes on"):
        return write_negatives(args, cache)


def write_negatives(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Mines, and writes OUT and the report; bad options, inputs and outputs are told before anything is encoded."""
    out = cli.new_output(args.out, [".jsonl"])
    report = cli.new_output(args.report) if args.report else cli.writable(out.with_name(f"{out.name}.report.json"))
    if report.absolute() == out.absolute():
        raise UserError(f"--report {report}: is OUT itself; name another file")
    rule = Rule.given(args.rule, {name: value for name in NUMBERS if (value := getattr(args, name)) is not None})
    source_config, packages = read_source(args)
    from jaxembed.curation.mining import MiningOptions, embed, mine, of_texts
    from jaxembed.curation.pool import open_input, read_corpus, read_pool
    from jaxembed.curation.report import details, line, summary
    from jaxembed.data.batch import RawText
    from jaxembed.hub.cross_encoder import open_cross_encoder
    from jaxembed.hub.frozen_encoder import open_frozen_encoder

    cli.set_up_jax()
    by_bm25 = args.candidates == "bm25"
    ways = MiningOptions(
        rule, args.seed, args.consistency_top_k, args.keep_negatives, by_bm25, args.memory_mb, args.approximate
    )
    source = open_input(source_config, packages, cache)
    corpus = read_corpus(args.corpus, cache, args.text_column) if args.corpus else None
    pool = read_pool(source, corpus, args.seed)
    if pool.candidates < rule.first:
        told = f"of {pool.searched} documents at most {pool.candidates} may be negatives of one query"
        raise UserError(f"{told}, and {rule.limit} takes them from rank {rule.first} on; name more documents by --corpus")
    rescore = of_texts(open_cross_encoder(args.cross_encoder, cache), pool) if args.cross_encoder else None
    model = open_frozen_encoder(args.model, cache, cli.make_mesh(args.fsdp))
    of_documents = source_config.instruction_of_documents(next(iter(source_config.instructions), ""))
    queries = embed(pool.queries, model.encode, model.width, "queries")
    texts = [RawText(text, "document", of_documents) for text in pool.documents]
    result = mine(pool, queries, embed(texts, model.encode, model.width, "documents"), ways, rescore)
    counts = summary(pool, result, rule)
    if "warning" in counts:
        log.warning("warning: %s", counts["warning"])
    named = {
        "model": model.identity, "cross_encoder": args.cross_encoder, "corpus_paths": args.corpus, "digest": source.digest,
        "source": source_config.model_dump(mode="json", exclude_defaults=True),
    }  # fmt: skip
    settings = {**named, "ways": dataclasses.asdict(ways)}
    write(out, (line(pool, row) for row in result.rows), report, {**counts, **settings, **details(pool, result)})
    return {"out": str(out), "report": str(report), **counts}


def write(out: Path, rows: Iterable[Mapping[str, Any]], report: Path, told: Mapping[str, Any]) -> None:
    """Writes OUT, then the report; `UserError` says which of them could not be written."""
    from jaxembed.data.jsonl import write_lines
    from jaxembed.files import write_json, written_whole

    try:
        with written_whole(out) as partial:
            write_lines(partial, rows)
        write_json(report, told)
    except OSError as error:
        failed, kept = (report, f"{out} is whole") if out.exists() else (out, "make room, and the same command goes on")
        raise UserError(f"{failed}: cannot be written ({error.strerror}); {kept}") from None


def read_source(args: argparse.Namespace) -> tuple[config.SourceConfig, config.PythonPackagesConfig]:
    """What IN says of rows and instructions: by the options, or as the source of a config that it names."""
    asked, rows = {"instructions": (args.instruction,)} if args.instruction else {}, cli.row_options(args)
    if not args.config:
        tree = {"path": args.input, **rows, **asked}
        return parse_section(config.SourceConfig, tree, "command line"), config.PythonPackagesConfig()
    settings = config.load_config(args.config, base="")
    sources = settings.all_sources()
    found = [source for source in sources if args.input in (source.display_name, source.path)]
    if len(found) != 1:
        names = ", ".join(source.display_name for source in sources)
        raise UserError(f"{args.config}: {len(found)} sources are named {args.input}; expected the name of one: {names}")
    return found[0].model_copy(update=asked), settings.in_stages()[0].data.python_packages


def make_parser() -> cli.Parser:
    default = Rule()
    parser = cli.parser("mine", f"{__doc__}\n\n{ABOUT}")
    parser.add_argument("model", metavar="MODEL", help="any that jaxembed or sentence-transformers loads: a folder or hub id")
    parser.add_argument("input", metavar="IN", help="queries and positives: a path or name, as in a config (docs/data.md)")
    parser.add_argument("out", metavar="OUT.jsonl", help="must not exist")
    group = parser.add_argument_group("input")
    cli.add_rows(group)
    group.add_argument("--config", metavar="CONFIG.yaml", help="IN is the name of one of its sources, taken as it says")
    group.add_argument("--instruction", default="", metavar="TEXT", help='of queries whose row has no "prompt"')
    group.add_argument(
        "--corpus", nargs="+", metavar="PATH",
        help='where negatives are looked for: BEIR folders, or whatever holds rows with "text" (and "title"), such as .jsonl, '
        ".parquet or .txt (default: the positives and negatives of IN)",
    )  # fmt: skip
    group.add_argument("--text-column", default="text", metavar="NAME", help='of the corpus, instead of "text"')
    group = parser.add_argument_group("candidates", "the documents nearest to a query, but for its positives and itself")
    group.add_argument("--depth", type=whole(1), metavar="N", help=f"how many a query has; default: {default.depth}")
    group.add_argument(
        "--candidates", choices=["model", "bm25"], default="model", help="nearest by MODEL (default), or by BM25"
    )
    group.add_argument(
        "--cross-encoder", metavar="MODEL",
        help="a sentence-transformers cross-encoder, whose scores order candidates, feed the rule and stand in OUT",
    )  # fmt: skip
    group = parser.add_argument_group("negatives", "the candidates that a rule chooses; docs/mining.md has all rules")
    group.add_argument("--rule", choices=RULES, default=default.name, help=f"default: {default.name}")
    group.add_argument("--negatives", type=whole(1), metavar="N", help=f"of a row, at most; default: {default.negatives}")
    told = f"topk_perc_pos: the highest score, as a part of the positive's, 0 to 1; default: {default.share}"
    group.add_argument("--share", type=float, metavar="X", help=told)
    told = f"topk_margin_pos: the highest score is so far below the positive's; default: {default.margin}"
    group.add_argument("--margin", type=float, metavar="X", help=told)
    group.add_argument(
        "--max-score", type=float, metavar="X", help=f"topk_abs: the highest score; default: {default.max_score}"
    )
    told = f"window: the first and the last rank, counted from 1; default: {' '.join(map(str, default.window))}"
    group.add_argument("--window", type=whole(1), nargs=2, metavar=("A", "B"), help=told)
    group.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help=f"of what {' and '.join(SAMPLED)} draw; default: 0"
    )
    group.add_argument("--keep-negatives", action="store_true", help="IN's own come first, and --negatives more")
    group.add_argument(
        "--consistency-top-k", type=whole(1), default=0, metavar="K",
        help="leave out positives above which K other documents score, and rows without any other (default: keep all)",
    )  # fmt: skip
    group = parser.add_argument_group("search and report")
    group.add_argument(
        "--memory-mb", type=whole(1), default=512, metavar="N", help="of the search, on each device; default: 512"
    )
    cli.add_fsdp(group)
    group.add_argument("--approximate", action="store_true", help="a faster search on TPUs; its recall is in the report")
    group.add_argument("--report", metavar="FILE.json", help="counts, histograms, samples; default: OUT.jsonl.report.json")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
