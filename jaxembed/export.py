"""Export a model as a Hugging Face / sentence-transformers folder.

Usage: python -m jaxembed.export MODEL OUT [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.errors import UserError
from jaxembed.training.run_dir import BASE_RECORD_FILE
from jaxembed.training.shutdown import stop_on_signals

LAYOUTS = ("sentence-transformers", "nv-embed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Export a model. Return the folder, its dtype, and how far its vectors are from the model's."""
    out = cli.prepare_new_output(args.out)
    from transformers.utils import logging

    from jaxembed.hub.card import read_card
    from jaxembed.hub.export import export
    from jaxembed.hub.export_adapters import export_adapters
    from jaxembed.hub.export_nv_embed import export_nv_embed

    logging.disable_progress_bar()  # the folder is loaded and saved several times
    getLogger("sentence_transformers").setLevel(ERROR)  # it warns that the CPU, which checks the folder, is slow
    with stop_on_signals(f"{out}: not written"):
        if args.adapters:
            check_adapter_options(args)
            cli.set_up_jax()
            return {"folder": str(out), **export_adapters(Path(args.model), out, args.checkpoint).summarize()}
        embedder = cli.load_model(args.model, **cli.get_model_options(args))
        if args.layout == "nv-embed":
            parity = export_nv_embed(embedder, out, args.dtype)
        else:
            parity = export(embedder, out, args.dtype, read_card(Path(args.model), embedder.revision, args.adapter))
    return {"folder": str(out), "revision": embedder.revision, "dtype": args.dtype, **parity.summarize()}


def check_adapter_options(args: argparse.Namespace) -> None:
    """Check the options that go with --adapters.

    Raises:
        UserError: An option does not apply to adapters, or MODEL is not a run.
    """
    if args.layers is not None or args.dtype != "float32" or args.layout != LAYOUTS[0] or args.adapter is not None:
        raise UserError("--adapters: writes all adapters of a run unchanged. Omit --layers, --dtype, --layout and --adapter.")
    if not (Path(args.model) / BASE_RECORD_FILE).is_file():
        raise UserError(f"{args.model}: not a run directory (--adapters expects a run that was trained with model.lora).")


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.new_parser("export", __doc__ + "\nNothing is written unless the folder gives the vectors of the model.")
    cli.add_model_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the weights")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0],
        help="layout of the folder (default: sentence-transformers); nv-embed: that of NV-Embed's release, for models trained "
        "from it",
    )  # fmt: skip
    parser.add_argument("--adapters", action="store_true", help="write the LoRA adapters of a run as PEFT folders instead")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
