"""Finds hard negatives for pairs: python -m jaxembed.mine MODEL IN OUT.jsonl [--corpus PATH ...]"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from jaxembed import cli
from jaxembed.cli import whole
from jaxembed.curation.rules import RULES, SAMPLED, Rule
from jaxembed.errors import UserError


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the files that were written and the counts of the report."""
    out = cli.new_output(args.out)
    report = cli.new_output(args.report) if args.report else out.with_name(f"{out.name}.report.json")
    rule = Rule(args.rule, args.negatives, args.depth, tuple(args.window), args.max_score, args.margin, args.share)
    from jaxembed import parallel
    from jaxembed.curation.mining import Ways, embed, mine, of_texts
    from jaxembed.curation.pool import open_input, read_corpus, read_pool
    from jaxembed.curation.report import details, line, summary
    from jaxembed.data.batch import RawText
    from jaxembed.data.jsonl import write_lines
    from jaxembed.files import write_json, written_whole
    from jaxembed.hub.cross_encoder import open_cross_encoder
    from jaxembed.hub.other_model import open_encoder

    cli.use_compilation_cache()
    cache = cli.cache_dir()
    by_bm25 = args.candidates == "bm25"
    ways = Ways(rule, args.seed, args.consistency_top_k, args.keep_negatives, by_bm25, args.memory_mb, args.approximate)
    source = open_input(args.input, args.instruction, cache)
    pool = read_pool(source, read_corpus(args.corpus, cache) if args.corpus else None, args.seed)
    rescore = of_texts(open_cross_encoder(args.cross_encoder, cache), pool) if args.cross_encoder else None
    model = open_encoder(args.model, cache, parallel.make_mesh(fsdp=args.fsdp))
    queries = embed(pool.queries, model.encode, model.width, "queries")
    texts = [RawText(text, "document", "") for text in pool.documents]
    result = mine(pool, queries, embed(texts, model.encode, model.width, "documents"), ways, rescore)
    counts = summary(pool, result, rule)
    named = {"model": model.identity, "cross_encoder": args.cross_encoder, "input": args.input, "digest": source.digest}
    try:
        with written_whole(out) as partial:
            write_lines(partial, (line(pool, row) for row in result.rows))
            write_json(report, {**counts, **named, "ways": dataclasses.asdict(ways), **details(pool, result)})
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another output") from None
    return {"out": str(out), "report": str(report), **counts}


if __name__ == "__main__":
    about = (
        "IN is whatever training takes, but for rows of text and label. OUT has its rows in the main format, with the\n"
        "negatives that were found and MODEL's scores of positives and negatives. A query's positives, in whatever row, and\n"
        "the query itself are never its negatives. Vectors are kept: a command that was stopped goes on."
    )
    default = Rule()
    parser = cli.parser("mine", f"{__doc__}\n\n{about}")
    parser.add_argument("model", metavar="MODEL", help="any that jaxembed or sentence-transformers loads")
    parser.add_argument("input", metavar="IN", help="queries and positives")
    parser.add_argument("out", metavar="OUT.jsonl", help="must not exist")
    parser.add_argument(
        "--corpus", nargs="+", metavar="PATH",
        help='BEIR folders, or whatever holds rows with "text", such as .jsonl, .parquet or .txt (default: all texts of IN)',
    )  # fmt: skip
    parser.add_argument("--instruction", default="", help='of the queries whose row has no "prompt"')
    group = parser.add_argument_group("negatives")
    group.add_argument("--rule", choices=RULES, default=default.name, help=f"default: {default.name}; docs/mining.md has all")
    group.add_argument("--negatives", type=whole(1), default=default.negatives, metavar="N", help="of a row; default: 7")
    group.add_argument("--depth", type=whole(1), default=default.depth, metavar="N", help="candidates of a query; default: 100")
    group.add_argument("--share", type=float, default=default.share, help="topk_perc_pos: of the positive's; default: 0.95")
    group.add_argument("--margin", type=float, default=default.margin, help="topk_margin_pos: below it; default: 0.05")
    group.add_argument("--max-score", type=float, default=default.max_score, help="topk_abs: the highest; default: 0.7")
    group.add_argument(
        "--window", type=whole(1), nargs=2, default=default.window, metavar=("A", "B"), help="window: ranks; default: 50 100"
    )
    group.add_argument("--seed", type=whole(0), default=0, help=f"of {' and '.join(SAMPLED)}; default: 0")
    group.add_argument("--keep-negatives", action="store_true", help="IN's own come first")
    group.add_argument(
        "--consistency-top-k", type=whole(1), default=0, metavar="K",
        help="leave out positives that are not among the K nearest of their query, and rows without any other",
    )  # fmt: skip
    group.add_argument("--candidates", choices=["model", "bm25"], default="model", help="found by MODEL (default) or by BM25")
    group.add_argument("--cross-encoder", metavar="MODEL", help="scores candidates anew, for the rule and for OUT")
    parser.add_argument("--memory-mb", type=whole(1), default=512, help="of the search, beside the vectors; default: 512")
    cli.add_fsdp(parser)
    parser.add_argument("--approximate", action="store_true", help="a faster search on TPUs; its recall is in the report")
    parser.add_argument("--report", metavar="FILE.json", help="counts, histograms, samples; default: OUT.jsonl.report.json")
    cli.run(main, parser)
