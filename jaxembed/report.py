"""Write a report about runs and scores: one HTML page that needs no network.

Usage: python -m jaxembed.report RUN_OR_SCORES ... OUT.html
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import shlex
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.config.local_paths import shorten_command
from jaxembed.errors import UserError

log = logging.getLogger("jaxembed")

ENDINGS = (".html", ".htm")
CHART_PACKAGES = ("altair", "vl_convert")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Write a report. Return its path, its size, the models, and the sections."""
    out = Path(args.out)
    if out.suffix not in ENDINGS:
        raise UserError(f"{out}: expected a page that ends in {' or '.join(ENDINGS)}. Name it last, as in RUN OUT.html.")
    if out.is_dir():
        raise UserError(f"{out}: is a folder (expected a page to write). Name another output.")
    check_packages()
    from jaxembed.reporting.inputs import read_inputs

    models = read_inputs(args.inputs)
    cli.prepare_output(out)
    cli.set_up_jax()
    from jaxembed.devices.mesh import make_fsdp_mesh
    from jaxembed.reporting.contents import make_sections
    from jaxembed.reporting.page import write_page

    mesh = None if args.no_model else make_fsdp_mesh(args.fsdp)
    sections = make_sections(models, mesh, args.baseline, args.checkpoint)
    names = [model.name for model in models]
    size = write_page(out, f"Report: {', '.join(names)}", sections, format_command(args))
    log.info("wrote %s (%.1f MB): open it in a browser", out, size / 1e6)
    section_ids = [section.id for section in sections if not section.is_empty]
    return {"report": str(out), "bytes": size, "models": names, "sections": section_ids}


def format_command(args: argparse.Namespace) -> str:
    """Return the command with its options, for the page, with absolute paths shortened."""
    options = ["--no-model"] if args.no_model else []
    for name, default in (("checkpoint", "best"), ("fsdp", 1), ("baseline", None)):
        if (value := getattr(args, name)) != default:
            options += [f"--{name}", str(value)]
    return shorten_command(shlex.join(["python", "-m", "jaxembed.report", *args.inputs, args.out, *options]))


def check_packages() -> None:
    """Raise `UserError` if a package that draws charts is not installed."""
    for name in CHART_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report: {name} is not installed. Run pip install '.[report]'.")


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.new_parser("report", __doc__)
    parser.add_argument(
        "inputs", metavar="RUN_OR_SCORES", nargs="+",
        help="run directory, or scores.json (or its folder) from evaluate --out; several are compared",
    )  # fmt: skip
    parser.add_argument("out", metavar="OUT.html", help="page to write; an existing page is replaced")
    parser.add_argument(
        "--no-model", action="store_true", help="load no model: leave out map, neighbors, similarities, and latent attention"
    )
    parser.add_argument("--checkpoint", default="best", help="checkpoint of the runs: best (default), last, or a step")
    cli.add_fsdp_argument(parser)
    parser.add_argument("--baseline", metavar="NAME", help="model that the others are compared with (default: the first)")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
