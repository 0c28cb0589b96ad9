"""Train an embedding model.

Usage: python -m jaxembed.train CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.config import Config, load_config
from jaxembed.config.sections import make_key_table
from jaxembed.config.shipped import list_shipped_configs
from jaxembed.data.sources import detect_format
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.hub.folders import check_base_exists
from jaxembed.planning.assignment import run_in_child, write_assignments
from jaxembed.planning.topology import skip_tpu_discovery
from jaxembed.training.run_dir import check_run_dir
from jaxembed.training.shutdown import RESUME_MESSAGE, stop_on_signals


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Read the config, then train, or plan the run with --plan. Return the result."""
    config = load_config(args.config, args.overrides)
    for source in config.all_sources():
        detect_format(source)  # a mistyped path is reported before JAX loads
    if args.slices and not args.topology:
        raise UserError(f"--slices is {args.slices} without --topology. Name the slice, such as --topology v5e:16x16.")
    if args.code and not args.topology:
        raise UserError("--code needs --topology. Name the slice, such as --topology v5e:16x16.")
    if args.plan or args.topology:
        return _plan(config, args)
    check_base_exists(config.model.base)
    check_run_dir(config)
    # These import JAX, so only after the checks that need none.
    cli.set_up_jax()
    from jaxembed.devices.mesh import make_mesh

    with stop_on_signals(RESUME_MESSAGE), processes.process_group(config.train.stall_timeout_s):
        make_mesh(**dict(config.mesh))
        from jaxembed.runs.train import train

        return train(config, shlex.join(["python", "-m", "jaxembed.train", args.config, *args.overrides]))


def _plan(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Compile the steps of a run ahead of time and return their memory and FLOPs.

    For a slice that is not here, each stage is planned in a process of its own, which does not generate code
    (`jaxembed.planning.assignment`).
    """
    if not args.topology or args.code:
        return _plan_stages(config, args, range(len(config.stages)))
    plans = [_plan_without_code(config, args, index) for index in range(len(config.stages))]
    return plans[0] | {"stages": [stage for plan in plans for stage in plan["stages"]]}


def _plan_without_code(config: Config, args: argparse.Namespace, index: int) -> dict[str, Any]:
    """Plan a stage in a child process. Its machine code is not generated."""
    # The folder belongs to this process: the child may be killed.
    with tempfile.TemporaryDirectory(prefix="jaxembed-plan-") as folder:
        return run_in_child(partial(_plan_with_assignments, config, args, index, Path(folder)))


def _plan_with_assignments(config: Config, args: argparse.Namespace, index: int, folder: Path) -> dict[str, Any]:
    """Plan a stage by the buffer assignments that XLA writes to a folder."""
    write_assignments(folder)
    return _plan_stages(config, args, [index], folder)


def _plan_stages(
    config: Config, args: argparse.Namespace, indices: Iterable[int], assignments: Path | None = None
) -> dict[str, Any]:
    """Plan some stages of a run."""
    if args.topology:
        skip_tpu_discovery()
    from jaxembed.planning.plan import make_planning_target, plan
    from jaxembed.runs.open import open_run

    target = make_planning_target(config.mesh, args.topology, args.slices or 1)._replace(assignments=assignments)
    run = open_run(config, target.mesh)
    return plan(config, target, run.model, [run.stages[index] for index in indices])


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.new_parser("train", f"{__doc__}\nThe same command resumes a run whose directory holds a checkpoint.")
    parser.epilog = f"shipped configs: {', '.join(list_shipped_configs())}"
    parser.is_intermixed = True
    parser.hint = "Set config keys as train.steps=3. "
    parser.add_argument("--keys", action="version", version=make_key_table(Config), help="list every config key and exit")
    parser.add_argument("config", metavar="CONFIG.yaml", help="config file, or the name of a shipped config (below)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="such as train.steps=100 or run.dir=runs/a"
    )
    parser.add_argument(
        "--plan", action="store_true", help="compile ahead of time, print the memory and FLOPs of a step, and exit"
    )
    parser.add_argument("--topology", metavar="NAME:SHAPE", help="plan for a TPU slice that is not here, such as v5e:16x16")
    parser.add_argument(
        "--code", action="store_true", help="with --topology, also generate the machine code of a step (many times slower)"
    )
    parser.add_argument("--slices", type=cli.integer_from(1), metavar="N", help="number of slices of the topology (default: 1)")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
