"""Mine hard negatives for pairs.

Usage: python -m jaxembed.mine MODEL IN OUT.jsonl [--corpus PATH ...]
"""

from __future__ import annotations

import argparse
import typing
from pathlib import Path
from typing import Any

import numpy as np
from annotated_types import Ge
from pydantic.fields import FieldInfo

from jaxembed import cli, config
from jaxembed.config.curation_models import Ranker
from jaxembed.config.mining import MINING_RULES, RULES_BY_KEY, SAMPLED_RULES, STAGE_KEYS, MineConfig
from jaxembed.config.sections import parse_section
from jaxembed.curation.rules import option_name
from jaxembed.errors import UserError
from jaxembed.files import cache_dir
from jaxembed.search.bm25 import check_bm25_installed
from jaxembed.training.shutdown import stop_on_signals

ABOUT = """\
IN is anything that training reads, except rows of text and label. OUT has the rows of IN as pairs (query, pos, neg), with the
mined negatives, and the scores of positives and negatives. The positives of a query, in any row, and the query
itself never become its negatives. Vectors are cached, so the same command continues after a stop."""
RANKERS: dict[str, tuple[Ranker, ...]] = {"model": ("vectors",), "bm25": ("bm25",), "fused": ("vectors", "bm25")}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Mine negatives. Return the files that were written and the counts of the report."""
    # Bad options and outputs fail before JAX loads.
    out, report_path = prepare_outputs(args)
    rule, source = read_rule(args), read_source(args)
    if "bm25" in RANKERS[args.candidates]:
        check_bm25_installed()
    cli.set_up_jax()
    from jaxembed.curation.mining import MiningOptions
    from jaxembed.curation.source_mining import MiningJob, mine_source
    from jaxembed.devices.mesh import make_fsdp_mesh

    options = MiningOptions(
        config=rule,
        seed=args.seed,
        keep_negatives=args.keep_negatives,
        rankers=RANKERS[args.candidates],
        memory_mb=args.memory_mb,
        approximate=args.approximate,
    )
    job = MiningJob(
        model=args.model,
        source=source,
        options=options,
        corpus_paths=args.corpus,
        text_column=args.text_column,
        cross_encoder=args.cross_encoder,
        out=out,
        report_path=report_path,
    )
    cache = cache_dir()
    with stop_on_signals(f"the vectors and scores so far are kept in {cache}; the same command continues"):
        return mine_source(job, cache, make_fsdp_mesh(args.fsdp))


def prepare_outputs(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the paths of OUT and of the report. Raise `UserError` if they cannot be written."""
    out = cli.prepare_new_output(args.out, [".jsonl"])
    report_path = (
        cli.prepare_new_output(args.report) if args.report else cli.prepare_output(out.with_name(f"{out.name}.report.json"))
    )
    cli.check_not_out(report_path, "--report", out)
    return out, report_path


def read_rule(args: argparse.Namespace) -> MineConfig:
    """Return the `mine` section that the options define. Raise `UserError` for an option that the rule does not read."""
    settings = {key: value for key in list_rule_fields() if (value := getattr(args, key)) is not None}
    rule = settings.setdefault("rule", MineConfig().rule)
    for key in settings:
        if rule not in (rules := RULES_BY_KEY.get(key, MINING_RULES)):
            raise UserError(
                f"{option_name(key)}: --rule {rule} does not read it (read by: {', '.join(rules)}). Remove it or choose "
                "another rule."
            )
    return parse_section(MineConfig, settings, f"--rule {rule}")


def read_source(args: argparse.Namespace) -> config.SourceConfig:
    """Return the source section of IN, built from the options or taken from the config that they name."""
    changes = {"instructions": (args.instruction,)} if args.instruction else {}
    row_options = cli.get_row_settings(args)
    if not args.config:
        return parse_section(config.SourceConfig, {"path": args.input, **row_options, **changes}, "command line")
    sources = config.load_config(args.config, base="").all_sources()
    matches = [source for source in sources if args.input in (source.display_name, source.path)]
    if len(matches) != 1:
        names = ", ".join(source.display_name for source in sources)
        raise UserError(f"{args.config}: {len(matches)} sources are named {args.input} (expected one of: {names}).")
    return matches[0].model_copy(update=changes)


def list_rule_fields() -> dict[str, Any]:
    """Return the fields of the `mine` section that are options of the command."""
    return {key: field for key, field in MineConfig.model_fields.items() if key not in STAGE_KEYS}


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each key of the `mine` section, with the key's type, default and description."""
    group = parser.add_argument_group("rule", "the keys of the section mine of a config; see docs/guides/mining.md")
    for key, field in list_rule_fields().items():
        default = " ".join(map(str, np.ravel(field.default)))
        group.add_argument(option_name(key), help=f"{field.description} Default: {default}.", **_make_argument_settings(field))


def _make_argument_settings(field: FieldInfo) -> dict[str, Any]:
    """Return the settings of an option for a field: a choice, a number, or a tuple of two positive integers."""
    annotation = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return {"choices": typing.get_args(annotation)}
    if typing.get_origin(annotation) is tuple:
        return {"type": cli.integer_from(1), "nargs": 2, "metavar": ("A", "B")}
    if annotation is not int:
        return {"type": float, "metavar": "X"}
    return {"type": cli.integer_from(0 if Ge(0) in field.metadata else 1), "metavar": "N"}


def make_parser() -> cli.Parser:
    """Build the parser of the command."""
    parser = cli.new_parser("mine", f"{__doc__}\n{ABOUT}")
    parser.add_argument(
        "model", metavar="MODEL", help="any model that jaxembed or sentence-transformers loads: folder or hub id"
    )
    parser.add_argument("input", metavar="IN", help="queries and positives: a path or name, as in a config")
    parser.add_argument("out", metavar="OUT.jsonl", help="output file, which must not exist")
    group = parser.add_argument_group("input")
    cli.add_row_arguments(group)
    group.add_argument("--config", metavar="CONFIG.yaml", help="take IN from this config, by the name of a source")
    group.add_argument("--instruction", default="", metavar="TEXT", help='instruction of queries whose row has no "prompt"')
    group.add_argument(
        "--corpus", nargs="+", metavar="PATH",
        help='documents to search: BEIR folders, or files of rows with "text" (and "title"), such as .jsonl, .parquet or .txt. '
        "Default: the positives and negatives of IN.",
    )  # fmt: skip
    group.add_argument("--text-column", default="text", metavar="NAME", help="column of the corpus that has the text")
    add_rule_options(parser)
    group = parser.add_argument_group("candidates", "the best documents of a query, without its positives and itself")
    group.add_argument(
        "--candidates",
        choices=list(RANKERS),
        default="model",
        help="nearest by MODEL (default), best by BM25, or both, combined by reciprocal rank fusion",
    )
    group.add_argument(
        "--cross-encoder", metavar="MODEL",
        help="sentence-transformers cross-encoder whose scores order the candidates, apply to the rule, and are written to OUT",
    )  # fmt: skip
    group.add_argument("--keep-negatives", action="store_true", help="keep the negatives of IN, before the mined ones")
    group.add_argument(
        "--seed", type=cli.integer_from(0), default=0, metavar="N",
        help=f"seed of the samples that {' and '.join(SAMPLED_RULES)} draw. Default: 0.",
    )  # fmt: skip
    group = parser.add_argument_group("search and report")
    group.add_argument(
        "--memory-mb", type=cli.integer_from(1), default=512, metavar="N",
        help="memory of the search on each device, in MiB. Default: 512.",
    )  # fmt: skip
    cli.add_fsdp_argument(group)
    group.add_argument("--approximate", action="store_true", help="search faster on TPUs; the report has the recall")
    group.add_argument("--report", metavar="FILE.json", help="counts, histograms and samples. Default: OUT.jsonl.report.json.")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
