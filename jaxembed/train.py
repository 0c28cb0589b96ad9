"""Trains an embedding model: python -m jaxembed.train CONFIG.yaml [key.sub=value ...]"""

from __future__ import annotations

import argparse
from typing import Any

from jaxembed import cli, config
from jaxembed.config.sections import table
from jaxembed.data.sources import detect_format
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.planning.topology import look_for_no_tpu


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the config and trains; returns what `jaxembed.runs.train.train` does, or `jaxembed.planning.plan` with --plan."""
    settings = config.load_config(args.config, args.overrides)
    for source in settings.data.sources:
        detect_format(source)  # a mistyped path is told before JAX loads
    if args.slices and not args.topology:
        raise UserError(f"--slices is {args.slices} without --topology; name the slice, such as --topology v5e:16x16")
    if args.topology:
        look_for_no_tpu()
    if args.plan or args.topology:
        from jaxembed.planning.plan import plan

        return plan(settings, args.topology, args.slices or 1)
    from jaxembed.runs.train import train  # imports JAX: after the config is known to be good

    cli.set_up_jax()
    with processes.together(settings.train.stall_timeout_s):
        return train(settings)


if __name__ == "__main__":
    parser = cli.parser("train", __doc__ + "\n\nThe same command resumes a run whose directory holds a checkpoint.")
    parser.hint = "config keys are set as train.steps=3; "
    parser.add_argument(
        "--keys", action="version", version=table(config.Config).replace("%", "%%"), help="list every config key and exit"
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="see configs/ for examples")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="such as train.steps=100 or run.dir=runs/a"
    )
    parser.add_argument("--plan", action="store_true", help="compile ahead of time, tell what a step needs, and exit")
    parser.add_argument("--topology", metavar="NAME:SHAPE", help="of a plan: a TPU slice that is not here, such as v5e:16x16")
    parser.add_argument("--slices", type=cli.whole(1), metavar="N", help="of a topology: how many such slices (default: 1)")
    cli.run(main, parser)
