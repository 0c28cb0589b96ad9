"""Write training rows with an LLM server, by a recipe of prompts.

Usage: python -m jaxembed.synthesize RECIPE.yaml OUT [key.sub=value ...] --server URL --model NAME
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.config.sections import make_key_table
from jaxembed.config.shipped import SYNTHESIS_FOLDER, find_config
from jaxembed.config.synthesis import SynthesisConfig, load_synthesis_config
from jaxembed.config.synthesis_steps import BM25, SearchStepConfig
from jaxembed.data.heldout import split_pairs
from jaxembed.errors import UserError
from jaxembed.files import cache_dir
from jaxembed.training.shutdown import stop_on_signals
from jaxembed.verification.http_client import read_key

ABOUT = """\
The folder OUT gets a training file for each task of the recipe, the provenance of its rows, report.json and report.html, and
every request and answer. After an interruption, the same command continues without asking again. A larger --max-rows adds rows.

A key is read from the environment variable OPENAI_API_KEY, or from the one that --key-env names. It is never stored."""


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the synthesis. Return the files that were written, and the rows, requests and tokens."""
    config = load_synthesis_config(args.config, args.overrides, args.max_rows)
    recipe, out = find_config(args.config, [SYNTHESIS_FOLDER]), Path(args.out)
    if args.dry_run:
        from jaxembed.synthesis.estimate import estimate_synthesis

        return estimate_synthesis(config, recipe, args.model, out)
    if not args.server or not args.model:
        raise UserError("synthesize: needs --server URL and --model NAME. Set both, or add --dry-run for an estimate.")
    cli.check_ray_arguments(args)
    from jaxembed.synthesis.endpoints import ServerOptions
    from jaxembed.synthesis.engine import synthesize
    from jaxembed.synthesis.ray_servers import RayServers
    from jaxembed.synthesis.servers import LlmServers

    if any(isinstance(step, SearchStepConfig) and step.by != BM25 for task in config.tasks for step in task.steps):
        cli.set_up_jax()
    options = ServerOptions(
        urls=args.server, model=args.model, api_key=read_key(args.key_env), key_variable=args.key_env,
        timeout_s=args.timeout, concurrency=args.concurrency,
    )  # fmt: skip
    with ExitStack() as stack:
        cluster = stack.enter_context(cli.open_ray_cluster(args))
        stack.enter_context(stop_on_signals(f"{out} is not finished; the same command continues"))
        source = RayServers(cluster, options) if cluster else stack.enter_context(closing(LlmServers(options)))
        report = synthesize(config, recipe, source, out, cache=cache_dir(), budget_tokens=args.budget_tokens)
        return report | hold_out(config, report["files"], args.heldout_percent)


def hold_out(config: SynthesisConfig, files: Sequence[str], percent: int | None) -> dict[str, Any]:
    """Divide each file of pairs into NAME-split/train.jsonl and the BEIR folder NAME-split/heldout. Return the row counts."""
    if percent is None:
        return {}
    names = {task.name for task in config.tasks if "pos" in task.row}
    pairs = [path for path in map(Path, files) if path.stem in names]
    splits = {path: path.with_name(f"{path.stem}-split") for path in pairs}
    for split in splits.values():
        shutil.rmtree(split, ignore_errors=True)  # left by an earlier run with fewer rows
    documents = config.inputs.get("documents", "")
    return {"heldout": {str(out): split_pairs(str(path), out, percent / 100, documents) for path, out in splits.items()}}


def make_parser() -> cli.Parser:
    """Build the parser of the command."""
    parser = cli.new_parser("synthesize", f"{__doc__}\n{ABOUT}")
    parser.is_intermixed = True
    parser.add_argument(
        "config", metavar="RECIPE.yaml", help="recipe: a YAML file, or the name of a recipe in the package, such as example"
    )
    parser.add_argument("out", metavar="OUT", help="output folder: a new one, or one of the same recipe, to continue it")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="a key to set, such as inputs.documents=docs.jsonl"
    )
    parser.add_argument(
        "--server", action="append", metavar="URL",
        help="OpenAI-compatible server, such as http://localhost:8000 (/v1 is added unless the URL has a path); give it "
        "several times if several servers share the work",
    )  # fmt: skip
    parser.add_argument("--model", default="", metavar="NAME", help="name of the model on the server")
    parser.add_argument("--max-rows", type=cli.integer_from(1), metavar="N", help="rows to write, of all tasks (default: all)")
    parser.add_argument(
        "--budget-tokens", type=cli.integer_from(1), metavar="N",
        help="token limit of OUT: prompts and answers, earlier runs included (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--concurrency", type=cli.integer_from(1, 1024), default=16, metavar="N",
        help="concurrent requests to all servers together (default: 16)",
    )  # fmt: skip
    parser.add_argument(
        "--heldout-percent", type=cli.integer_from(1, 99), metavar="N",
        help="also write each file of pairs as TASK-split/train.jsonl and the BEIR folder TASK-split/heldout, which has N "
        "percent of the positives and all documents of inputs.documents (default: no)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="estimate requests and tokens, and show a prompt of each step; send no request"
    )
    cli.add_server_arguments(parser, timeout_s=120)
    cli.add_ray_arguments(parser, "send the requests from workers")
    keys = make_key_table(SynthesisConfig)
    parser.add_argument("--keys", action="version", version=keys, help="list every key of a recipe and exit")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
