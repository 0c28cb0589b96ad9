"""Export a model as a Hugging Face / sentence-transformers folder.

Usage: python -m jaxembed.export MODEL OUT [--dtype bfloat16] [--onnx] [--push OWNER/NAME]
"""

from __future__ import annotations

import argparse
import shutil
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxembed import cli
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, exists, expand_home
from jaxembed.formats.run_files import BASE_RECORD_FILE
from jaxembed.search.precision import RANGES_FILE
from jaxembed.training.shutdown import stop_on_signals

if TYPE_CHECKING:
    from jaxembed.hub.export import OnnxWeights
    from jaxembed.hub.push import PushTarget

LAYOUTS = ("sentence-transformers", "nv-embed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Export a model, and push it. Return the folder, its dtype, the distance of its vectors from the model's, and its URL."""
    check_layout_options(args)
    target = read_push_target(args)
    out = cli.prepare_new_output(args.out)
    if target:
        target.check()
    result = write_folder(args, out)
    if target:
        from jaxembed.hub.push import push_folder

        with stop_on_signals(f"{out}: written, but not pushed to {target.repo}"):
            url = push_folder(out, target, f"Export of {result.get('revision', out.name)} with jaxembed")
        result["pushed"] = url
    return result


def read_push_target(args: argparse.Namespace) -> PushTarget | None:
    """Return the repository to push to; None without --push.

    Raises:
        UserError: An option of --push is given without it.
    """
    if args.push is None:
        if option := next((name for name in ("public", "update") if getattr(args, name)), None):
            raise UserError(f"--{option}: says how to push, so it needs --push OWNER/NAME.")
        return None
    from jaxembed.hub.push import PushTarget

    return PushTarget(args.push, args.public, args.update)


def write_folder(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Export a model. Return the folder, its dtype, and the distance of its vectors from the model's."""
    from transformers.utils import logging

    from jaxembed.data.tokenize import silence_transformers
    from jaxembed.hub.card import read_card
    from jaxembed.hub.export import export
    from jaxembed.hub.export_adapters import export_adapters
    from jaxembed.hub.export_nv_embed import export_nv_embed
    from jaxembed.hub.onnx_export import check_onnx_installed

    logging.disable_progress_bar()  # the folder is loaded and saved several times
    getLogger("sentence_transformers").setLevel(ERROR)  # it warns that the CPU, which checks the folder, is slow
    onnx: OnnxWeights | None = "int8" if args.onnx_int8 else "float32" if args.onnx else None
    if onnx:
        check_onnx_installed()
    # transformers would warn of a language-model head, which embedders do not load.
    with stop_on_signals(f"{out}: not written"), silence_transformers():
        if args.adapters:
            check_adapter_options(args)
            cli.set_up_jax()
            return {"folder": str(out), **export_adapters(expand_home(args.model), out, args.checkpoint).summarize()}
        embedder = cli.load_model(args.model, **cli.get_model_options(args))
        card = read_card(expand_home(args.model), embedder.revision, args.adapter)
        is_nv_embed = args.layout == "nv-embed"
        report = export_nv_embed(embedder, out, args.dtype) if is_nv_embed else export(embedder, out, args.dtype, card, onnx)
        copy_ranges(args, out)
    return {"folder": str(out), "revision": embedder.revision, "dtype": args.dtype, **report.summarize()}


def copy_ranges(args: argparse.Namespace, out: Path) -> None:
    """Copy the int8 ranges of the model into its export. Ranges of the whole model do not fit its first layers."""
    ranges = expand_home(args.model) / RANGES_FILE
    if not exists(ranges):
        return
    if args.layers is None:
        with atomic_write(out / RANGES_FILE) as partial:
            shutil.copyfile(ranges, partial)
    else:
        getLogger("jaxembed").warning(
            "%s: not copied, because it belongs to the whole model. Write ranges for the first layers.", ranges
        )


def check_layout_options(args: argparse.Namespace) -> None:
    """Raise `UserError` if --onnx is combined with another layout than that of sentence-transformers."""
    if (args.onnx or args.onnx_int8) and (args.adapters or args.layout != LAYOUTS[0]):
        raise UserError("--onnx: adds a graph to the sentence-transformers layout. Omit --adapters and --layout.")


def check_adapter_options(args: argparse.Namespace) -> None:
    """Check the options that go with --adapters.

    Raises:
        UserError: An option does not apply to adapters, or MODEL is not a run.
    """
    changes_model = args.layers is not None or args.dtype != "float32" or args.layout != LAYOUTS[0]
    if changes_model or args.adapter is not None or args.fsdp != 1:
        options = "--layers, --dtype, --layout, --adapter and --fsdp"
        raise UserError(f"--adapters: writes all adapters of a run unchanged. Omit {options}.")
    if not (expand_home(args.model) / BASE_RECORD_FILE).is_file():
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
    parser.add_argument(
        "--onnx", action="store_true",
        help="add onnx/model.onnx: the whole model in float32, from token ids and attention mask to vectors",
    )  # fmt: skip
    parser.add_argument(
        "--onnx-int8", action="store_true", help="also add onnx/model_int8.onnx, with int8 weights, and print its quality"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME",
        help="upload OUT to a new private repository of the Hugging Face hub (token: HF_TOKEN, or `hf auth login`)",
    )  # fmt: skip
    parser.add_argument("--public", action="store_true", help="with --push: make the new repository public")
    parser.add_argument(
        "--update", action="store_true", help="with --push: replace the files of a repository that exists, in a new commit"
    )
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
