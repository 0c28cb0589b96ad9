"""Writes a Hugging Face / sentence-transformers folder: python -m jaxembed.export MODEL OUT [--dtype bfloat16]"""

from __future__ import annotations

import argparse
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from jaxembed import cli
from jaxembed.errors import UserError
from jaxembed.training.run_dir import RECORD

LAYOUTS = ("sentence-transformers", "nv-embed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the folder, its dtype, and how far its vectors are from the model's."""
    out = cli.new_output(args.out)
    from transformers.utils import logging

    from jaxembed.hub.export import export, export_adapters, export_nv_embed

    logging.disable_progress_bar()  # of loading and saving, several times over
    getLogger("sentence_transformers").setLevel(ERROR)  # it runs on the CPU to check the folder, and warns that this is slow
    if args.adapters:
        cli.set_up_jax()
        if args.layers is not None or args.dtype != "float32" or args.layout != LAYOUTS[0] or args.adapter is not None:
            raise UserError(
                "--adapters writes all adapters of a run as they are: leave --layers, --dtype, --layout and --adapter out"
            )
        if not (Path(args.model) / RECORD).is_file():
            raise UserError(f"{args.model}: not a run directory; --adapters needs one that was trained with model.lora")
        parity = export_adapters(Path(args.model), out, args.checkpoint)
        return {"folder": str(out), **told(parity)}
    embedder = cli.load_model(args.model, **cli.model_options(args))
    if args.layout == "nv-embed":
        parity = export_nv_embed(embedder, out, args.dtype)
    else:
        parity = export(embedder, out, args.dtype, read_card(Path(args.model), embedder.revision, args.adapter))
    return {"folder": str(out), "revision": embedder.revision, "dtype": args.dtype, **told(parity)}


def told(parity: Any) -> dict[str, float]:
    return {"largest_difference": parity.error, "allowed": parity.allowed, "least_cosine": parity.cosine}


def read_card(model: Path, revision: str, adapter: str | None = None) -> Any:
    """What the model card tells of a run: base, recipe, and the scores of the exported checkpoint under its adapter."""
    from jaxembed.config import parse_config
    from jaxembed.config.fields import Fields
    from jaxembed.config.sections import read_tree
    from jaxembed.files import read_json, read_text
    from jaxembed.hub.card import Card
    from jaxembed.training.metrics import read_metrics

    if not (model / RECORD).is_file():
        return Card(name=model.name, base=revision)
    step = int(revision.removeprefix(f"{model.resolve().name}-").split("-")[0])
    rows = [row for row in read_metrics(model) if row["step"] == step]
    scores = {k.removeprefix("eval/"): v for row in rows for k, v in row.items() if k.startswith("eval/") and v is not None}
    base, config = Fields(read_json(model / RECORD), str(model / RECORD)).text("name"), model / "config.yaml"
    checkpoint = f"step {step}"
    if adapter is not None:
        checkpoint += f", adapter {adapter}"
        others = {s.name for s in parse_config(read_tree(config), str(config)).eval.sets if s.adapter != adapter}
        scores = {name: score for name, score in scores.items() if name.rpartition("/")[0] not in others}
    return Card(model.resolve().name, base, checkpoint, read_text(config), scores)


if __name__ == "__main__":
    parser = cli.parser("export", __doc__ + "\n\nNothing is written unless the folder gives the model's own vectors.")
    cli.add_model(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0],
        help="of the folder (default: sentence-transformers); nv-embed: that of NV-Embed's release, for models trained from it",
    )  # fmt: skip
    parser.add_argument("--adapters", action="store_true", help="write a run's LoRA adapters as PEFT folders instead")
    cli.run(main, parser)
