"""Merge models of one shape into one.

Usage: python -m jaxembed.merge OUT MODEL MODEL ... [--method slerp] [--weights 0.7,0.3]
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from jaxembed import cli
from jaxembed.errors import UserError
from jaxembed.training.shutdown import stop_on_signals

METHOD_NAMES = ("soup", "slerp")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Merge models. Return the folder, the models and weights, and the distance of its vectors from the merged model's."""
    weights = parse_weights(args.weights, args.method, len(args.models))
    out = cli.prepare_new_output(args.out)
    from transformers.utils import logging

    from jaxembed.hub.export import export
    from jaxembed.hub.merging import merge_models
    from jaxembed.hub.torch_model import import_sentence_transformers

    logging.disable_progress_bar()
    cli.set_up_jax()
    import_sentence_transformers()  # if it is missing, say so before anything is read
    with stop_on_signals(f"{out}: not written"):
        embedder, card = merge_models(args.models, weights, args.method, out.name, args.checkpoint)
        parity = export(embedder, out, args.dtype, card)
    sources = {"method": args.method, "models": args.models, "weights": weights}
    return {"folder": str(out), **sources, "dtype": args.dtype, **parity.summarize()}


def parse_weights(option: str | None, method: str, model_count: int) -> list[float]:
    """Return the weight of each model. They sum to 1.

    Args:
        option: Value of --weights. None: equal weights.
        method: soup or slerp.
        model_count: Number of models.

    Raises:
        UserError: The weights, or the number of models, do not fit the method.
    """
    if model_count < 2 or (method == "slerp" and model_count > 2):
        expected = "two models, between which it interpolates" if method == "slerp" else "two models or more"
        raise UserError(f"{method} of {model_count} model{'s' * (model_count > 1)}: expected {expected}. Change the MODELs.")
    try:
        numbers = [1.0] * model_count if option is None else [float(number) for number in option.split(",")]
    except ValueError:
        raise UserError(f"--weights: {option!r} is not a list of numbers (expected numbers such as 0.7,0.3).") from None
    if method == "slerp" and option is not None:
        if len(numbers) != 1 or not 0 <= numbers[0] <= 1:
            raise UserError(f"--weights: {option} does not fit slerp (expected one number from 0 to 1, of the second model).")
        numbers = [1 - numbers[0], numbers[0]]
    total = sum(numbers)
    if len(numbers) != model_count or min(numbers) < 0 or not 0 < total < math.inf:
        raise UserError(
            f"--weights: {option} does not fit the models (expected {model_count} numbers, one per model, none negative and "
            "not all 0)."
        )
    return [number / total for number in numbers]


def make_parser() -> cli.Parser:
    """Return the parser of the command line."""
    description = (
        "The result is exported and checked as by jaxembed.export. soup is the weighted mean of the parameters. slerp\n"
        "follows the arc between two models, tensor by tensor. Models must agree in shape, tokenizer, mask, pooling and\n"
        "template. Prompts and maximum length are those of the first model. Adapters are first merged into their base."
    )
    parser = cli.new_parser("merge", f"{__doc__}\n{description}")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="run directory; exported, PEFT, or Hugging Face folder; or hub id"
    )
    parser.add_argument("--method", choices=METHOD_NAMES, default=METHOD_NAMES[0], help="merging method (default: soup)")
    parser.add_argument(
        "--weights", metavar="A,B,...",
        help="soup: one number per model, divided by their sum (default: equal); slerp: weight of the second model, 0 to 1 "
        "(default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--checkpoint", default="best", help="checkpoint of runs: best (default), last, or a step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the weights")
    return parser


if __name__ == "__main__":
    cli.run_command(main, make_parser())
