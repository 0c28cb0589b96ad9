"""Turn raw training data into clean training files, with a report of what was dropped and why.

Usage: python -m jaxembed.curate CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxembed import cli
from jaxembed.config.curation import CurateConfig, load_curate_config
from jaxembed.config.sections import make_key_table
from jaxembed.files import cache_dir
from jaxembed.training.shutdown import stop_on_signals

if TYPE_CHECKING:
    from jaxembed.config.curation_models import JudgeConfig
    from jaxembed.curation.stages import CurationContext
    from jaxembed.hub.cross_encoder import ScorePairs

ABOUT = """\
The config has sources, as in training, and a list of steps. The output folder `out` gets one training file per source,
report.json and report.html. After an interruption, the same command continues; the output is identical byte for byte."""


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the curation. Return the files that were written, and the rows in and out of each source."""
    config = load_curate_config(args.config, args.overrides)
    from jaxembed.curation.batches import map_batches
    from jaxembed.curation.engine import curate
    from jaxembed.curation.ray_workers import map_batches_with_ray
    from jaxembed.curation.stages import needs_model

    cli.check_ray_arguments(args)
    if any(map(needs_model, config.steps)):
        cli.set_up_jax()
    with ExitStack() as stack:
        cluster = stack.enter_context(cli.open_ray_cluster(args))
        map_in_workers = functools.partial(map_batches_with_ray, cluster) if cluster else map_batches
        # Ray replaces the handlers of signals, so this comes after it.
        stack.enter_context(stop_on_signals(f"{config.out} is not finished; the same command continues"))
        return curate(config, make_context(cache_dir()), args.config, map_in_workers)


def make_context(cache: Path) -> CurationContext:
    """Return what the steps of a curation share. `cache` is the folder for row indexes, vectors and scores."""
    from jaxembed.curation.stages import CurationContext

    return CurationContext(cache, read_task, open_server)


def open_server(config: JudgeConfig, cache: Path) -> ScorePairs:
    """Open an LLM server as a judge (`synthesis.server_judge`)."""
    from jaxembed.synthesis.server_judge import open_server_judge

    return open_server_judge(config, cache)


def read_task(name: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Return the parts of an MTEB task and their texts. Raise `UserError` if there is no such task, or no data."""
    from jaxembed.evaluation.mteb_catalog import find_tasks
    from jaxembed.evaluation.mteb_texts import list_task_texts

    ((task, _),) = find_tasks([name], (), ())
    return list_task_texts(task)


def make_parser() -> cli.Parser:
    """Build the parser of the command."""
    parser = cli.new_parser("curate", f"{__doc__}\n{ABOUT}")
    parser.add_argument(
        "config", metavar="CONFIG.yaml", help="sources and steps: a file, or the name of a shipped config, such as pairs"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.sub=value",
        help="a key to set, such as out=curated2 or steps.0.html=true",
    )
    cli.add_ray_arguments(
        parser, "apply the steps that read only texts (clean, quality, language, negatives, decontaminate, function)"
    )
    keys = make_key_table(CurateConfig)
    parser.add_argument("--keys", action="version", version=keys, help="list every key of a config and exit")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
