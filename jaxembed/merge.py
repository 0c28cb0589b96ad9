"""Merges models of one shape into one: python -m jaxembed.merge OUT MODEL MODEL ... [--method slerp] [--weights 0.7,0.3]"""

from __future__ import annotations

import argparse
import math
from typing import Any

from jaxembed import cli
from jaxembed.errors import UserError

METHODS = ("soup", "slerp")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the folder, what was merged and how, and how far the folder's vectors are from the merged model's."""
    weights = model_weights(args.weights, args.method, len(args.models))
    out = cli.new_output(args.out)
    from transformers.utils import logging

    from jaxembed.export import told
    from jaxembed.hub.export import export, sentence_transformers
    from jaxembed.hub.merging import merge_models

    logging.disable_progress_bar()
    cli.set_up_jax()
    sentence_transformers()  # refuses where it is not there before anything is read
    embedder, card = merge_models(args.models, weights, args.method, out.name, args.checkpoint)
    parity = export(embedder, out, args.dtype, card)
    merged = {"method": args.method, "models": args.models, "weights": weights}
    return {"folder": str(out), **merged, "dtype": args.dtype, **told(parity)}


def model_weights(given: str | None, method: str, models: int) -> list[float]:
    """The weight of each model; they sum to 1. `UserError` where `given` is not what the method asks for."""
    if models < 2 or (method == "slerp" and models > 2):
        expected = "two models, between which it interpolates" if method == "slerp" else "two models or more"
        raise UserError(f"{method} of {models} model{'s' * (models > 1)}: name {expected}")
    try:
        numbers = [1.0] * models if given is None else [float(number) for number in given.split(",")]
    except ValueError:
        raise UserError(f"--weights is {given!r}; expected numbers with commas between them, such as 0.7,0.3") from None
    if method == "slerp" and given is not None:
        if len(numbers) != 1 or not 0 <= numbers[0] <= 1:
            raise UserError(f"--weights is {given}; slerp expects one number from 0 to 1, the weight of the second model")
        numbers = [1 - numbers[0], numbers[0]]
    total = sum(numbers)
    if len(numbers) != models or min(numbers) < 0 or not 0 < total < math.inf:
        raise UserError(f"--weights is {given}; expected {models} numbers, one a model, of at least 0 and not all 0")
    return [number / total for number in numbers]


if __name__ == "__main__":
    about = (
        "Writes what jaxembed.export writes, with the same check. soup is the weighted mean of the parameters; slerp goes\n"
        "along the arc between two models, tensor by tensor. Models must agree in shape, tokenizer, mask, pooling and\n"
        "template; prompts and the longest text are those of the first. Adapters are merged into their base first."
    )
    parser = cli.parser("merge", f"{__doc__}\n\n{about}")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="run directory, exported, PEFT or Hugging Face folder, or hub id"
    )
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="default: soup")
    parser.add_argument(
        "--weights", metavar="A,B,...",
        help="soup: one a model, divided by their sum (default: equal); slerp: that of the second model, 0 to 1 (default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--checkpoint", default="best", help="of runs: best (default), last, or a step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    cli.run(main, parser)
